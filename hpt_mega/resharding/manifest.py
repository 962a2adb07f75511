"""What an engine received, held against what was announced: names, rows, checksums, by the plan's buckets.

Both ends use it; how bytes travel is transport.py's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import xxhash
from torch import Tensor

from hpt_mega.resharding.planner import Bucket, Plan

_LISTED = 8


class TransferError(RuntimeError):
    """Weights that did not arrive as announced; names the tensors."""


def checksums(bucket: Bucket, buffer: Tensor) -> list[str]:
    """The xxh3 checksum of each slot's bytes, in the bucket's order. `buffer` is uint8 and in host memory."""
    data = buffer.numpy().data
    return [xxhash.xxh3_64_hexdigest(data[s.offset : s.offset + s.nbytes]) for s in bucket.slots]


class Ledger:
    """An engine's account of one weight update."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._received: set[int] = set()

    def receive(self, index: int, buffer: Tensor, announced: Sequence[str]) -> Bucket:
        """Check bucket `index` of the plan as it lies in `buffer`. Raises TransferError, naming tensors."""
        if not 0 <= index < len(self._plan.buckets):
            raise TransferError(f"bucket {index} of a plan of {len(self._plan.buckets)}")
        bucket = self._plan.buckets[index]
        if index in self._received:
            raise TransferError(f"bucket {index} came twice: {_list([s.name for s in bucket.slots])}")
        found = checksums(bucket, buffer)
        damaged = [
            slot.name for slot, one, other in zip(bucket.slots, found, announced, strict=True) if one != other
        ]
        if damaged:
            raise TransferError(f"bucket {index} arrived damaged: {_list(damaged)}")
        self._received.add(index)
        return bucket

    def finish(self) -> None:
        """Raise TransferError where part of the plan did not arrive."""
        absent = [
            slot.name
            for index, bucket in enumerate(self._plan.buckets)
            if index not in self._received
            for slot in bucket.slots
        ]
        if absent:
            raise TransferError(f"never arrived: {_list(absent)}")


def check_names(expected: Sequence[str], given: Sequence[str], what: str) -> None:
    """Raise TransferError that lists names missing, unexpected or given twice."""
    problems = {
        "missing": sorted(set(expected) - set(given)),
        "unexpected": sorted(set(given) - set(expected)),
        "twice": sorted({name for name in given if given.count(name) > 1}),
    }
    if found := [f"{kind}: {_list(names)}" for kind, names in problems.items() if names]:
        raise TransferError(f"{what}: {'; '.join(found)}")


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
