"""Brings whole buckets from a trainer's leader to the workers of one engine on another host, by broadcast.

How a replica's pieces come into the leader's buckets is gather.py's business.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.resharding.manifest import TransferError
from hpt_mega.resharding.planner import Plan

_POLL_S = 0.001
_DEVICES = {"gloo": "cpu", "nccl": "cuda"}


@dataclass(frozen=True)
class Meeting:
    """Where the ranks of a group find each other, and as what."""

    host: str  # rank 0's address, as the others reach it
    port: int
    world_size: int
    name: str
    backend: str  # gloo | nccl
    deadline_s: float  # of the meeting, and of each broadcast


class BroadcastGroup:
    """The leader of a replica, rank 0, and the workers of one engine.

    A group for each engine: one that dies or hangs ends its own, and one that comes back brings a new one.
    It stands beside torch's default group, and its keys are those of torch's own helper, so that SGLang joins
    it too. On nccl a bucket goes through a buffer on the GPU. As everywhere in torch.distributed nobody is
    asked for a key and nothing is encrypted: the hosts' network must be one that is trusted.
    """

    def __init__(self, meeting: Meeting, rank: int, store: dist.TCPStore | None = None) -> None:
        """Waits for all ranks. `store` is given by rank 0. Raises TransferError past the deadline."""
        self._meeting, self._rank = meeting, rank
        device = _DEVICES[meeting.backend]
        try:
            address = meeting.host if rank == 0 else address_towards(meeting.host)
            keys: dist.Store = store or _store(meeting)
            for prefix in (meeting.name, f"{meeting.name}/", f"{device}/"):
                keys = dist.PrefixStore(prefix, keys)
            self._group = _backend(meeting, rank, address, keys)
        except (RuntimeError, OSError) as error:
            raise self._error("did not meet", error) from None
        self._staging = torch.empty(0, dtype=torch.uint8, device=device)

    @classmethod
    def open(
        cls,
        host: str,
        world_size: int,
        name: str,
        backend: str,
        deadline_s: float,
        invite: Callable[[Meeting], object],
    ) -> BroadcastGroup:
        """A new group, as its rank 0 at address `host`.

        `invite` tells the others, and returns when they have joined; what it raises is raised.
        """
        try:
            listener = _listener(host)
            meeting = Meeting(host, listener.getsockname()[1], world_size, name, backend, deadline_s)
            store = _store(meeting, listener)
        except (RuntimeError, OSError) as error:
            raise TransferError(f"no port for group {name} at {host}: {error}") from None
        if backend == "nccl":  # the current device is a thread's own, and this may be another than training's
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(invite, meeting)
            try:
                group = cls(meeting, 0, store)
            except TransferError:
                answer.result()  # where they refused, that is the reason
                raise
            answer.result()
        return group

    @property
    def name(self) -> str:
        return self._meeting.name

    def send(self, flat: Tensor, announce: Callable[[], object]) -> None:
        """As rank 0, broadcast uint8 [bytes] of host memory.

        `announce` tells the engine meanwhile, and returns when it has taken them; what it raises is raised.
        It has a deadline of its own. Raises TransferError past the group's.
        """
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(announce)  # first: on nccl a group's first broadcast waits for the engine
            if self._meeting.backend == "nccl":
                flat = self._staged(flat).copy_(flat)
            self._await(self._broadcast(flat), answer, flat.numel())

    def _await(self, work: dist.Work, answer: Future[object], nbytes: int) -> None:
        must_end_by = time.monotonic() + self._meeting.deadline_s
        while not (work.is_completed() and answer.done()):
            if answer.done() and answer.exception() is not None:
                answer.result()
            if time.monotonic() > must_end_by:
                raise self._error("did not take a bucket", f"{nbytes} bytes")
            time.sleep(_POLL_S)
        try:
            work.wait()
        except RuntimeError as error:
            raise self._error("did not take a bucket", error) from None
        answer.result()

    def receive(self, flat: Tensor) -> None:
        """As another rank, fill uint8 [bytes] of host memory with what rank 0 sends. Raises TransferError."""
        on_gpu = self._meeting.backend == "nccl"
        target = self._staged(flat) if on_gpu else flat
        try:
            self._broadcast(target).wait(timedelta(seconds=self._meeting.deadline_s))
        except RuntimeError as error:
            raise self._error("did not bring a bucket", error) from None
        if on_gpu:
            flat.copy_(target)

    def close(self) -> None:
        """Leave. With a peer that hangs in a broadcast this takes what is left of the deadline."""
        self._group.abort()
        del self._group

    def _broadcast(self, tensor: Tensor) -> dist.Work:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        work: dist.Work = self._group.broadcast([tensor], options)
        return work

    def _staged(self, flat: Tensor) -> Tensor:
        if self._staging.numel() < flat.numel():
            self._staging = self._staging.new_empty(flat.numel())
        return self._staging[: flat.numel()]

    def _error(self, what: str, why: object) -> TransferError:
        m = self._meeting
        others = f"its {m.world_size - 1} others" if self._rank == 0 else "rank 0"
        reason = str(why).splitlines()[0]
        return TransferError(
            f"rank {self._rank} of group {m.name} at {m.host}:{m.port}: {others} {what} within "
            f"{m.deadline_s:g} s: {reason}"
        )


class NetworkBuckets:
    """A worker's own memory for the buckets of a plan; asked for one, it waits for the leader to send it."""

    def __init__(self, meeting: Meeting, rank: int, plan: Plan) -> None:
        self._plan = plan
        self._memory = torch.empty(plan.bucket_bytes, dtype=torch.uint8)
        self._group = BroadcastGroup(meeting, rank)

    def buffer(self, index: int) -> Tensor:
        """Bucket `index`, uint8; the next takes its place. Raises TransferError where it does not come."""
        flat = self._memory[: self._plan.buckets[index].nbytes]
        self._group.receive(flat)
        return flat

    def close(self) -> None:
        self._group.close()


def address_towards(host: str) -> str:
    """This machine's address on the way to another one. Raises OSError where there is no way."""
    family, kind, _, _, where = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(where)  # nothing is sent
        return str(probe.getsockname()[0])


def _listener(host: str) -> socket.socket:
    """A socket that listens at this address alone; a TCPStore's own would at all that the host has."""
    family, kind, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind)
    try:
        listener.bind(where)
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def _store(meeting: Meeting, listener: socket.socket | None = None) -> dist.TCPStore:
    """The store that listens there and owns it from now on; without a listener a client of it."""
    return dist.TCPStore(
        meeting.host,
        meeting.port,
        is_master=listener is not None,
        wait_for_workers=False,
        timeout=timedelta(seconds=meeting.deadline_s),
        master_listen_fd=listener.detach() if listener else None,
    )


def _backend(meeting: Meeting, rank: int, address: str, store: dist.Store) -> Any:
    """torch's process group of one backend, without the default group's bookkeeping; its stubs lack half."""
    gloo: Any = dist.ProcessGroupGloo
    if meeting.backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        # its watchdog ends the process at this time: our own deadline must come first
        options._timeout = timedelta(seconds=10 * meeting.deadline_s)
        return dist.ProcessGroupNCCL(store, rank, meeting.world_size, options)
    settings = gloo._Options()
    settings._timeout = timedelta(seconds=meeting.deadline_s)
    settings._devices = [gloo.create_device(hostname=address)]
    return gloo(store, rank, meeting.world_size, settings)
