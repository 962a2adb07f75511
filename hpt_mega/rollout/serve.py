"""`hpt serve`: a vLLM server on a rollout node, for a trainer on another, which finds it at its URL.

The trainer's side is external.py. The server is started again when it ends, also at its trainer's word.
"""

from __future__ import annotations

import argparse
import socket
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

from hpt_mega.config import Config, compose

_PORT = 30000


def configure(parser: argparse.ArgumentParser) -> None:
    """The options of `hpt serve`."""
    parser.description = (
        "Serve rollouts to a trainer on another node, with the trainer's own config. Both need one key, in "
        "the environment variable HPT_ROLLOUT_KEY; the trainer finds the server by rollout.server.urls. "
        "Key and weights travel in the clear: the network must be one that is trusted."
    )
    parser.epilog = "example: hpt serve experiment=hpt_70b rollout=vllm rollout.server.tp=8 --host 0.0.0.0"
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as those of hpt train")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: all of this node's (127.0.0.1)"
    )
    parser.add_argument("--port", type=int, default=_PORT, help=f"({_PORT})")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from hpt_mega.validation import validate_server

    cfg = compose(options.overrides)
    validate_server(cfg)
    return serve(cfg, options.host, options.port)


def serve(cfg: Config, host: str, port: int) -> int:
    """Keep a server running until this process is ended; 1 where it does not start time after time.

    Raises ConfigError where the environment holds no key, or none that HTTP can carry.
    """
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine).*not installed.*")
    from hpt_mega.rollout.engine import EngineError
    from hpt_mega.rollout.external import rollout_key
    from hpt_mega.rollout.servers import BACKOFF_S, DEATHS, HEARTBEATS, vllm_server

    key = rollout_key()
    name = f"{socket.gethostname()}_{port}"
    log = Path(cfg.run_dir) / "logs" / "servers" / f"{name}.log"  # apart from those that a new run removes
    server = replace(
        vllm_server(cfg, name, log, {}),
        address=host,
        port=port,
        key=key,
        middleware=("hpt_mega.rollout.vllm_plugin.OneTrainer",),
    )
    failures = 0
    try:
        while failures < DEATHS:
            try:
                server.start(cfg.rollout.server.start_deadline_s)
            except EngineError as error:
                failures += 1
                print(f"start {failures} of {DEATHS} failed: {error}", file=sys.stderr, flush=True)
            else:
                failures = 0
                print(f"serving at {server.client.url}; log: {log}", flush=True)
                while not (trouble := server.alive()):
                    time.sleep(cfg.rollout.server.answer_deadline_s / HEARTBEATS)
                print(f"the server {trouble}; starting it anew", flush=True)
            time.sleep(BACKOFF_S)
    finally:
        server.close()
    return 1
