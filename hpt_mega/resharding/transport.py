"""Moving the buckets of a weight update from the trainer's ranks to engines on the same host, by shared memory.

Each rank copies what it holds straight to its place in the bucket: the gather is the memory the engine reads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.resharding.manifest import TransferError, checksums
from hpt_mega.resharding.planner import Plan, Write

BUFFERS = 2  # one is filled while engines read the other

Send = Callable[[int, Sequence[str]], None]


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


def stream(
    plan: Plan,
    writes: Sequence[Sequence[Write]],
    shared: SharedBuckets,
    group: dist.ProcessGroup,
    send: Sequence[Send],
) -> None:
    """Fill the buckets together with all ranks of `group`, and have each engine read them in turn.

    `writes` are this rank's copies by bucket. `send`, given on one rank only, hands a bucket to an engine with
    its checksums and returns when it was read; while engines read one bucket, the ranks fill the next. What a
    send raises is raised there, and TransferError on the other ranks; all leave at the same bucket.
    """
    with ThreadPoolExecutor(max(1, len(send)), thread_name_prefix="weights") as pool:
        reading: list[Future[None]] = []
        for index, bucket in enumerate(plan.buckets):
            for write in writes[index]:
                write.run(shared.buffer(index))
            _agree(group, reading, f"bucket {index - 1} of {len(plan.buckets)}")
            if send:
                announced = checksums(bucket, shared.buffer(index))
                reading = [pool.submit(one, index, announced) for one in send]
        _agree(group, reading, "the last bucket")


def _agree(group: dist.ProcessGroup, reading: Sequence[Future[None]], what: str) -> None:
    """Wait for the reads of this rank's engines, and for all ranks; raise on all where one failed."""
    errors = [error for future in reading if (error := future.exception())]
    failed = torch.tensor([1 if errors else 0])
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if errors:
        raise errors[0]
    if failed.item():
        raise TransferError(f"an engine did not take {what} of the weights; the leader's log says why")
