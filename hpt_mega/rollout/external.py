"""A vLLM server at a URL, started by `hpt serve` on another host, as an engine of the fleet.

Weights reach it by broadcast; what it is asked is as for a server of our own (vllm.py). It serves one
trainer, from its start to its end: then its supervisor starts it anew, for the next.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import torch

from hpt_mega.config import ConfigError
from hpt_mega.resharding.manifest import TransferError
from hpt_mega.resharding.network import BroadcastGroup, Meeting, address_towards
from hpt_mega.resharding.planner import Plan
from hpt_mega.resharding.transport import SharedBuckets
from hpt_mega.rollout.engine import EngineError
from hpt_mega.rollout.exchange import ExchangeError, exchange, reading
from hpt_mega.rollout.vllm import VLLMClient
from hpt_mega.rollout.vllm_plugin import BEGIN, END, INSTANCE

KEY_VARIABLE = "HPT_ROLLOUT_KEY"  # the environment variable that holds the key of servers at URLs
_POLL_S = 0.5
_LOOK_S = 5.0


def rollout_key() -> str:
    """The key of KEY_VARIABLE, without the white space around it, such as a mounted file's line end.

    Raises ConfigError where there is none, or one that HTTP cannot carry; the message does not tell it.
    """
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not key:
        raise ConfigError(
            f"the environment variable {KEY_VARIABLE} is not set; give servers and trainer one secret, e.g. "
            "that of `openssl rand -hex 24`"
        )
    if not all("!" <= character <= "~" for character in key):
        raise ConfigError(
            f"the environment variable {KEY_VARIABLE} holds white space or characters beyond ASCII; expected "
            "one word of printable ASCII, e.g. that of `openssl rand -hex 24`"
        )
    return key


@dataclass
class RemoteClient(VLLMClient):
    """As VLLMClient, with buckets sent through a process group of this process and the server's workers."""

    workers: int = 1
    _group: BroadcastGroup | None = None
    _plan: Plan | None = None
    _shared: SharedBuckets | None = None

    def connect(self, path: str, plan: Plan) -> None:
        """Make the group. Our own buckets at `path` are what it is sent from."""
        self._plan, self._shared = plan, SharedBuckets(path, plan.bucket_bytes)

        def invite(meeting: Meeting) -> None:
            info = {"meeting": asdict(meeting), "plan": plan.describe(), "digest": plan.digest}
            self._post("/init_weight_transfer_engine", {"init_info": info}, self.update_deadline_s)

        try:
            self._group = BroadcastGroup.open(
                address_towards(str(urlsplit(self.url).hostname)),
                1 + self.workers,
                f"weights of {self.name}",
                "nccl" if torch.cuda.is_available() else "gloo",
                self.update_deadline_s,
                invite,
            )
        except (TransferError, OSError) as error:
            raise self.error(f"cannot be sent weights: {error}") from None

    def load(self, index: int, checksums: Sequence[str]) -> None:
        """Send bucket `index`, and have the engine load it."""
        if self._group is None or self._plan is None or self._shared is None:
            raise self.error("was not told what weights will come; connect comes first")
        flat = self._shared.buffer(index)[: self._plan.buckets[index].nbytes]
        body = {"update_info": {"index": index, "checksums": list(checksums)}}
        try:
            self._group.send(flat, lambda: self._post("/update_weights", body, self.update_deadline_s))
        except TransferError as error:
            raise self.error(str(error)) from None

    def error(self, what: str) -> EngineError:
        return _error(self.name, self.url, what)

    def leave(self) -> None:
        """End the group; the server's side of it has ended or will past its deadline."""
        group, self._group = self._group, None
        if group is not None:
            group.close()


@dataclass
class ExternalServer:
    """One server at a URL; an EngineHandle. It is ended and started by its own supervisor, at our word."""

    name: str
    url: str
    key: str = field(repr=False)
    workers: int  # its tensor-parallel ranks
    request_deadline_s: float
    update_deadline_s: float
    answer_deadline_s: float = 30.0
    _client: RemoteClient | None = None
    _instance: str = ""

    @property
    def client(self) -> RemoteClient:
        """Raises EngineError where the server was not found yet."""
        if self._client is None:
            raise _error(self.name, self.url, "was not found yet")
        return self._client

    def start(self, deadline_s: float) -> None:
        """Wait until the server answers and is nobody else's. Raises EngineError.

        One that an earlier trainer had, or ours before we gave it up, may be in the middle of anything: it is
        told to end, and its supervisor starts it anew.
        """
        self.close()
        must_end_by = time.monotonic() + deadline_s
        while True:
            try:
                self._instance = self._ask("POST", BEGIN)
                break
            except ExchangeError as error:
                if error.status == 409:
                    self._end()
                elif error.status is not None:
                    raise _error(
                        self.name, self.url, f"is none that `hpt serve` started with our key: {error}"
                    ) from None
                if time.monotonic() > must_end_by:
                    raise _error(
                        self.name, self.url, f"was not ready within {deadline_s:g} s: {error}"
                    ) from None
            time.sleep(_POLL_S)
        self._client = RemoteClient(
            self.name,
            self.url,
            self.key,
            self.request_deadline_s,
            self.update_deadline_s,
            self.answer_deadline_s,
            Path(),  # its log is where it runs
            workers=self.workers,
        )

    def alive(self) -> str:
        """Empty while the server that we began with answers; else what is wrong."""
        if self._client is None:
            return "not found yet"
        if trouble := self._client.trouble():
            return trouble
        try:
            instance = self._ask("GET", INSTANCE)
        except ExchangeError as error:
            return str(error)
        return "" if instance == self._instance else "was started anew, and has not our weights"

    def log_tail(self, lines: int) -> str:
        """Nothing: a server at a URL keeps its log where it runs."""
        return ""

    def close(self) -> None:
        """End the server we began with: its supervisor starts it anew. Nothing where there is none."""
        client, self._client = self._client, None
        if client is not None:
            self._end()
            client.leave()

    def _end(self) -> None:
        try:
            exchange(self.url, "POST", END, "{}", self.key, _LOOK_S)
        except ExchangeError:
            return  # it ends without an answer, or has ended

    def _ask(self, method: str, path: str) -> str:
        """The name of the server's instance. Raises ExchangeError."""
        answer = exchange(self.url, method, path, "{}", self.key, _LOOK_S)
        with reading(path, ExchangeError):
            return str(json.loads(answer)["instance"])


def _error(name: str, url: str, what: str) -> EngineError:
    return EngineError(f"engine {name} at {url} {what}")
