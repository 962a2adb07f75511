"""What vLLM's processes load of ours: by the entry point vllm.general_plugins and by --middleware.

Light on purpose: it is imported before vLLM has chosen its platform.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

BACKEND = "hpt_shared_memory"


def register() -> None:
    """Make the transfer engine known to vLLM."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "hpt_mega.rollout.vllm_worker", "SharedMemoryTransfer"
        )


class RequireKey:
    """ASGI middleware: vLLM's own --api-key does not cover the endpoints that change weights. This one covers
    all but /health."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        self._expected = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"] != "/health":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not secrets.compare_digest(given, self._expected):
                await send({"type": "http.response.start", "status": 401, "headers": []})
                await send({"type": "http.response.body", "body": b"unauthorized"})
                return
        await self._app(scope, receive, send)
