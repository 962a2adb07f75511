"""One exchange with servers that drip, end early, say too much, or are to be sent what HTTP cannot carry."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from hpt_mega.rollout import exchange as module
from hpt_mega.rollout.exchange import ExchangeError, exchange, reading

pytestmark = pytest.mark.timeout(60)
Say = Callable[[bytes], None]


@contextmanager
def peer(answer: Callable[[Say], None]) -> Iterator[str]:
    """The URL of a server whose one connection `answer` writes to, as raw bytes, and closes."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            try:
                asked = b""
                while not asked.endswith(b"{}"):  # what is left unread would reset the connection
                    asked += connection.recv(65536)
                answer(connection.sendall)
            except OSError:
                return  # we have hung up

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    thread.join(20)
    listener.close()


def ask(url: str, timeout_s: float = 20.0, key: str = "secret") -> bytes:
    return exchange(url, "POST", "/ask", "{}", key, timeout_s)


def drip(head: bytes, drop: bytes) -> Callable[[Say], None]:
    def answer(say: Say) -> None:
        say(head)
        for _ in range(200):
            say(drop)
            time.sleep(0.05)

    return answer


@pytest.mark.parametrize(
    ("head", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
    ],
    ids=["content", "chunks", "size of a chunk", "no length", "headers"],
)
def test_a_peer_that_drips_does_not_hold_the_call_past_its_deadline(head: bytes, drop: bytes) -> None:
    with peer(drip(head, drop)) as url:
        began = time.monotonic()
        with pytest.raises(ExchangeError, match=r"gave no answer to /ask within 0\.5 s"):
            ask(url, 0.5)
        assert time.monotonic() - began < 3.0


@pytest.mark.parametrize(
    "head", [b"Content-Length: 20\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n14\r\n", b"\r\n"]
)
def test_an_answer_is_whole_or_an_error(head: bytes) -> None:
    for sent in (b"a" * 20, b"a" * 7):
        end = b"\r\n0\r\n\r\n" if b"chunked" in head and len(sent) == 20 else b""
        with peer(lambda say, sent=sent + end: say(b"HTTP/1.1 200 OK\r\n" + head + sent)) as url:  # type: ignore[misc]
            if len(sent) == 20 or head == b"\r\n":
                assert ask(url) == sent
            else:
                with pytest.raises(ExchangeError, match=r"/ask failed: IncompleteRead"):
                    ask(url)


@pytest.mark.parametrize(
    "head", [b"Content-Length: 99999999999999", b"Transfer-Encoding: chunked\r\n\r\nfffffffffff"]
)
def test_an_answer_of_too_many_bytes_is_not_kept(head: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    sent = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + bytes(1 << 21)
    with (
        peer(lambda say: say(sent)) as url,
        pytest.raises(ExchangeError, match="answered /ask with over 1000 bytes"),
    ):
        ask(url)


@pytest.mark.parametrize("key", ["a-secret\n", "a-secret\r\nX: y", "a-secret€"])
def test_a_key_that_http_cannot_carry_is_an_error_that_does_not_tell_it(key: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(ExchangeError, match="/ask was not asked: HTTP cannot carry the key") as raised,
    ):
        ask(f"http://127.0.0.1:{listener.getsockname()[1]}", key=key)
    assert raised.value.__suppress_context__ and "a-secret" not in repr(raised.value)


def test_what_cannot_be_read_is_told_as_the_callers_error() -> None:
    wanted = "answered /ask with something else than asked for: KeyError: 'b'"
    with pytest.raises(ExchangeError, match=wanted), reading("/ask", ExchangeError):
        {}["b"]
