"""The latest numbers of a run in Prometheus' text format, served on the loopback interface."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PATIENCE_S = 10.0  # with a connection that asks nothing, whose thread would wait for ever


class PrometheusEndpoint:
    """http://127.0.0.1:PORT/metrics, from its making until close(). Port 0 takes a free one: `port`.

    Raises OSError where the port is taken.
    """

    def __init__(self, port: int) -> None:
        self._text = b""
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            timeout = PATIENCE_S

            def do_GET(self) -> None:
                found = self.path == "/metrics"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(endpoint._text if found else b"the numbers are at /metrics\n")

            def log_message(self, *arguments: object) -> None:
                pass  # a scrape is no news

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        lines = [f"hpt_step {step}"]
        lines += [f"hpt_{re.sub(r'[^a-zA-Z0-9_]', '_', name)} {value}" for name, value in numbers.items()]
        self._text = ("\n".join(lines) + "\n").encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
