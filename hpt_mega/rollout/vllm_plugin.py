"""What vLLM's processes load of ours: by the entry point vllm.general_plugins and by --middleware.

Light on purpose: it is imported before vLLM has chosen its platform.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
from collections.abc import Awaitable, Callable
from typing import Any

BACKEND = "hpt"
# what OneTrainer answers
BEGIN, END, INSTANCE = "/hpt/begin", "/hpt/end", "/hpt/instance"


def register() -> None:
    """Make the transfer engine known to vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "hpt_mega.rollout.vllm_worker", "BucketTransfer")


class RequireKey:
    """ASGI middleware: vLLM's own --api-key does not cover the endpoints that change weights. This one covers
    all but /health, and websockets."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        kind = scope["type"]
        if kind == "websocket" or (kind == "http" and scope["path"] != "/health"):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self._expected):
                if kind == "http":
                    await _answer(send, 401, "unauthorized")
                else:
                    await send({"type": "websocket.close", "code": 1008})  # before accept: answered with 403
                return
        await self._app(scope, receive, send)


class OneTrainer:
    """ASGI middleware: a server serves one trainer, which takes it fresh from its start and ends it.

    What another left, such as half an update, is not to be mended: the server ends, and whoever supervises it
    starts it anew. POST /hpt/begin gives the instance's name, once; GET /hpt/instance gives it again, so that
    a server which was started anew meanwhile is known from the one before; POST /hpt/end ends it.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._instance = secrets.token_hex(8)
        self._taken = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = scope["path"] if scope["type"] == "http" else ""
        if path == END:
            os.kill(os.getpid(), signal.SIGKILL)  # its guard ends the workers
        elif path == BEGIN and self._taken:
            await _answer(send, 409, "a trainer has it already")
        elif path in (BEGIN, INSTANCE):
            self._taken = self._taken or path == BEGIN
            await _answer(send, 200, json.dumps({"instance": self._instance}))
        else:
            await self._app(scope, receive, send)


async def _answer(send: Any, status: int, body: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body.encode()})
