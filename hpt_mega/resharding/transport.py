"""The buckets of a weight update from begin to end, and the memory that they are filled in and read from.

Ranks and engines of the leader's host use that memory itself; how ranks of other hosts fill it is in
gather.py, how engines of other hosts are sent it in network.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.resharding.manifest import TransferError, checksums
from hpt_mega.resharding.planner import Plan

BUFFERS = 2  # one is filled while engines read the other


class SharedBuckets:
    """Anonymous shared memory of two buckets. It has no name to clean up: it ends with its last user.

    Other processes of the same user reach it as `path` while the process that made it lives.
    """

    def __init__(self, path: str, bucket_bytes: int) -> None:
        size = BUFFERS * bucket_bytes
        self.path = path
        whole = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        self.buffers = whole.split(bucket_bytes)

    @classmethod
    def create(cls, bucket_bytes: int) -> SharedBuckets:
        """Memory of this process's own; it is zero, and takes no room until written."""
        descriptor = os.memfd_create("hpt-weights")
        os.ftruncate(descriptor, BUFFERS * bucket_bytes)
        shared = cls(f"/proc/{os.getpid()}/fd/{descriptor}", bucket_bytes)
        shared._descriptor = descriptor
        return shared

    _descriptor: int | None = None

    def buffer(self, index: int) -> Tensor:
        """The memory that bucket `index` of a plan passes through."""
        return self.buffers[index % BUFFERS]

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class Receiver(Protocol):
    """An engine's side of a weight update; each call returns when the engine has done it, or raises."""

    def begin_update(self) -> None: ...

    def load(self, index: int, checksums: Sequence[str]) -> None:
        """Read bucket `index`; its memory is filled anew when all have returned."""
        ...

    def finish_update(self, policy_version: int) -> None: ...


def stream(
    plan: Plan,
    fill: Callable[[int], None],
    shared: SharedBuckets | None,
    group: dist.ProcessGroup,
    engines: Sequence[Receiver],
    policy_version: int,
) -> None:
    """Fill the buckets together with all ranks of `group`, and have each engine read them in turn.

    `fill` brings what this rank holds of a bucket; `group` is one to wait in. `engines` are given on one rank
    only, which has the memory `shared`. While they read one bucket, the ranks fill the next. What an engine
    raises is raised there, and TransferError on the other ranks; all leave at the same bucket.
    """
    with ThreadPoolExecutor(max(1, len(engines)), thread_name_prefix="weights") as pool:
        busy: list[Future[None]] = [pool.submit(engine.begin_update) for engine in engines]
        for index, bucket in enumerate(plan.buckets):
            fill(index)
            _agree(group, busy)
            if engines:
                assert shared is not None
                announced = checksums(bucket, shared.buffer(index))
                busy = [pool.submit(engine.load, index, announced) for engine in engines]
        _agree(group, busy)
        busy = [pool.submit(engine.finish_update, policy_version) for engine in engines]
        _agree(group, busy)


def _agree(group: dist.ProcessGroup, busy: Sequence[Future[None]]) -> None:
    """Wait for this rank's engines, and for all ranks; raise on all where one failed."""
    errors = [error for future in busy if (error := future.exception())]
    failed = torch.tensor([len(errors)], device=device_of(group))
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if errors:
        raise errors[0]
    if failed.item():
        raise TransferError("an engine did not take the weights; the log of the replica's leader says why")


def device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the tensors that go through a group lie."""
    return torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
