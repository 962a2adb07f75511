"""What travels to an engine and where it lies on the way: Hugging Face tensors in buckets of bounded size.

Pure arithmetic on shapes. transport.py moves the bytes, manifest.py checks what arrived.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hpt_mega.resharding.mapping.fusion import Piece
from hpt_mega.spec import CODED_DTYPES, DTYPE_CODES, Spec

ALIGNMENT = 64  # bytes; every slot begins at a multiple, so that it can be viewed as any dtype


@dataclass(frozen=True)
class Slot:
    """Rows [first_row, first_row + rows) of a tensor, at a byte offset of a bucket. A scalar has one row."""

    name: str  # Hugging Face's
    dtype: str  # safetensors' code, e.g. "BF16"
    shape: tuple[int, ...]  # of the whole tensor
    first_row: int
    rows: int
    offset: int

    @property
    def torch_dtype(self) -> torch.dtype:
        return CODED_DTYPES[self.dtype]

    @property
    def nbytes(self) -> int:
        return self.rows * math.prod(self.shape[1:]) * self.torch_dtype.itemsize

    @property
    def is_whole(self) -> bool:
        return self.rows == (self.shape[0] if self.shape else 1)

    def view(self, bucket: Tensor) -> Tensor:
        """The slot's rows as a tensor [rows, ...], on a bucket's bytes (uint8)."""
        raw = bucket[self.offset : self.offset + self.nbytes]
        return raw.view(self.torch_dtype).view(self.rows, *self.shape[1:])


@dataclass(frozen=True)
class Bucket:
    slots: tuple[Slot, ...]

    @property
    def nbytes(self) -> int:
        last = self.slots[-1]
        return last.offset + last.nbytes


@dataclass(frozen=True)
class Plan:
    """The buckets of one weight update, in the order they are sent; the same on every rank and engine."""

    buckets: tuple[Bucket, ...]
    bucket_bytes: int

    @cached_property
    def digest(self) -> str:
        """What ranks and engines compare before a byte moves."""
        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for bucket in self.buckets for slot in bucket.slots)

    def names(self) -> list[str]:
        """The tensors in the order they first appear."""
        return list(dict.fromkeys(slot.name for bucket in self.buckets for slot in bucket.slots))

    def describe(self) -> dict[str, Any]:
        """The plan as plain data, for the wire."""
        return {
            "bucket_bytes": self.bucket_bytes,
            "buckets": [[asdict(slot) for slot in bucket.slots] for bucket in self.buckets],
        }

    @classmethod
    def parse(cls, described: Mapping[str, Any]) -> Plan:
        """The plan that `describe` described."""
        buckets = tuple(
            Bucket(tuple(Slot(**(slot | {"shape": tuple(slot["shape"])})) for slot in slots))
            for slots in described["buckets"]
        )
        return cls(buckets, described["bucket_bytes"])


def plan_update(tensors: Mapping[str, Spec], bucket_bytes: int) -> Plan:
    """Put tensors into buckets in their order; one that is larger than a bucket is cut by rows.

    Raises ValueError where a single row is larger than a bucket.
    """
    buckets: list[Bucket] = []
    slots: list[Slot] = []
    used = 0
    for name, spec in tensors.items():
        rows = spec.shape[0] if spec.shape else 1
        row_bytes = spec.nbytes // max(rows, 1)
        if row_bytes > bucket_bytes:
            raise ValueError(
                f"a row of {name} has {row_bytes} bytes and a bucket {bucket_bytes}; raise "
                "rollout.server.bucket_mib"
            )
        smallest = spec.nbytes if spec.nbytes <= bucket_bytes else row_bytes
        first = 0
        while first < rows:
            if slots and bucket_bytes - used < smallest:
                buckets.append(Bucket(tuple(slots)))
                slots, used = [], 0
            count = min(rows - first, (bucket_bytes - used) // row_bytes) if row_bytes else rows
            slots.append(Slot(name, DTYPE_CODES[spec.dtype], spec.shape, first, count, used))
            used = min(bucket_bytes, -(-(used + count * row_bytes) // ALIGNMENT) * ALIGNMENT)
            first += count
    if slots:
        buckets.append(Bucket(tuple(slots)))
    return Plan(tuple(buckets), bucket_bytes)


@dataclass(frozen=True)
class Write:
    """One copy a rank makes: its view of a parameter, into a region of a slot."""

    slot: Slot
    source: Tensor
    dim: int
    start: int  # within the slot, along dim

    def run(self, bucket: Tensor) -> None:
        target = self.slot.view(bucket)
        target.narrow(self.dim, self.start, self.source.shape[self.dim]).copy_(self.source)


def plan_writes(plan: Plan, pieces: Iterable[tuple[str, Piece]]) -> list[list[Write]]:
    """By bucket, the copies that bring a rank's pieces, by tensor's name, to their place in the plan."""
    by_name: dict[str, list[Piece]] = {}
    for name, piece in pieces:
        by_name.setdefault(name, []).append(piece)
    return [
        [
            write
            for slot in bucket.slots
            for piece in by_name.get(slot.name, [])
            for write in _cut(slot, piece)
        ]
        for bucket in plan.buckets
    ]


def _cut(slot: Slot, piece: Piece) -> Iterator[Write]:
    """The copy of what piece and slot have in common, if anything."""
    part = piece.part if piece.part.ndim else piece.part[None]
    if piece.dim != 0:
        yield Write(slot, part[slot.first_row : slot.first_row + slot.rows], piece.dim, piece.start)
        return
    begin = max(piece.start, slot.first_row)
    end = min(piece.start + len(part), slot.first_row + slot.rows)
    if begin < end:
        yield Write(slot, part[begin - piece.start : end - piece.start], 0, begin - slot.first_row)
