"""Whole tensors out of the buckets of a plan, for engines that take no parts of one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpt_mega.resharding.planner import Bucket, Slot


class Assembly:
    """One update's tensors; one that is cut by rows is kept until its last rows are there."""

    def __init__(self) -> None:
        self._parts: dict[str, Tensor] = {}

    def take(self, bucket: Bucket, buffer: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors that the bucket completes. Those that lie whole in `buffer` are views of it."""
        for slot in bucket.slots:
            tensor = self._whole(slot, buffer)
            if tensor is not None:
                yield slot.name, tensor

    def _whole(self, slot: Slot, buffer: Tensor) -> Tensor | None:
        part = slot.view(buffer)
        if slot.is_whole:
            return part.view(slot.shape)
        whole = self._parts.setdefault(slot.name, torch.empty(slot.shape, dtype=part.dtype))
        whole[slot.first_row : slot.first_row + slot.rows] = part
        is_last = slot.first_row + slot.rows == slot.shape[0]
        return self._parts.pop(slot.name) if is_last else None
