"""One HTTP exchange with an engine's server, on a connection of its own; what is asked, the engines say."""

from __future__ import annotations

import http.client
from urllib.parse import urlsplit


class ExchangeError(Exception):
    """An exchange that failed; the message goes on from the engine's name. `status` is of an HTTP answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def exchange(url: str, method: str, path: str, body: str | None, key: str, timeout_s: float) -> bytes:
    """The answer's content. `key` goes as a bearer token, where there is one. Raises ExchangeError."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout_s)
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
    except TimeoutError:
        raise ExchangeError(f"gave no answer to {path} within {timeout_s:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise ExchangeError(f"{path} failed: {error or type(error).__name__}") from None
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        said = content.decode(errors="replace")[:500]
        raise ExchangeError(f"answered {response.status} to {path}: {said}", response.status)
    return content
