"""One HTTP exchange with an engine's server, on a connection of its own; what is asked, the engines say."""

from __future__ import annotations

import http.client
import io
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

# Rollouts are the largest answers: 128 samples of 32768 tokens, with their log-probabilities in some 200
# characters of JSON a token, are 0.8 GiB.
MOST_BYTES = 1 << 30
_BLOCK_BYTES = 1 << 20


class ExchangeError(Exception):
    """An exchange that failed; the message goes on from the engine's name. `status` is of an HTTP answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


def exchange(url: str, method: str, path: str, body: str | None, key: str, timeout_s: float) -> bytes:
    """The answer's content. `key` goes as a bearer token, where there is one. Raises ExchangeError.

    The whole answer must be there within timeout_s, however steadily it drips, and be of MOST_BYTES at most.
    """
    must_end_by = time.monotonic() + timeout_s
    parts = urlsplit(url)
    assert parts.hostname is not None
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname, parts.port, timeout=timeout_s)
    connection.response_class = lambda sock, **about: _Response(sock, must_end_by, **about)  # type: ignore[assignment]
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = _content(response, path)
    except TimeoutError:
        raise ExchangeError(f"gave no answer to {path} within {timeout_s:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise ExchangeError(f"{path} failed: {error or type(error).__name__}") from None
    except ValueError:  # its text holds what was to be sent: the key
        raise ExchangeError(f"{path} was not asked: HTTP cannot carry the key or the URL as given") from None
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        said = content[:2000].decode(errors="replace")[:500]
        raise ExchangeError(f"answered {response.status} to {path}: {said}", response.status)
    return content


@contextmanager
def reading(path: str, error: Callable[[str], Exception]) -> Iterator[None]:
    """Around what takes an answer to pieces: where it is not of the form asked for, `error` is raised."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as found:
        what = f"{type(found).__name__}: {found}"[:200]
        raise error(f"answered {path} with something else than asked for: {what}") from None


def _content(response: http.client.HTTPResponse, path: str) -> bytes:
    content = bytearray()
    while block := response.read(_BLOCK_BYTES):
        content += block
        if len(content) > MOST_BYTES:
            raise ExchangeError(f"answered {path} with over {MOST_BYTES} bytes")
    if response.length:
        raise http.client.IncompleteRead(bytes(content), response.length)
    return bytes(content)


class _Response(http.client.HTTPResponse):
    """Its timeout is that of all reads together, where http.client has one for each."""

    def __init__(self, sock: socket.socket, must_end_by: float, **about: Any) -> None:
        super().__init__(sock, **about)
        self.fp.close()
        self.fp = io.BufferedReader(_Until(sock, must_end_by), _BLOCK_BYTES)


class _Until(io.RawIOBase):
    """What a socket receives until a time of the monotonic clock; then TimeoutError."""

    def __init__(self, sock: socket.socket, must_end_by: float) -> None:
        self._sock, self._must_end_by = sock, must_end_by
        self._file = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        left = self._must_end_by - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._file.readinto(buffer)

    def close(self) -> None:
        self._file.close()
        super().close()
