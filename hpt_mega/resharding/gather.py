"""How the pieces of a replica's ranks come into its leader's buckets, from the same host and from others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.resharding.manifest import TransferError
from hpt_mega.resharding.planner import Slot, Write
from hpt_mega.resharding.transport import SharedBuckets, device_of


@dataclass(frozen=True)
class _Place:
    """Where a write of another rank goes; its bytes follow by themselves."""

    slot: Slot
    dim: int
    start: int
    shape: tuple[int, ...]
    nbytes: int

    @classmethod
    def of(cls, write: Write) -> _Place:
        return cls(write.slot, write.dim, write.start, tuple(write.source.shape), write.source.nbytes)

    def write(self, raw: Tensor) -> Write:
        """The write, with its source read from bytes (uint8)."""
        return Write(self.slot, raw.view(self.slot.torch_dtype).view(self.shape), self.dim, self.start)


class Gather:
    """One rank's part in filling the buckets; all ranks of `group`, whose first is the leader, make theirs.

    Ranks on the leader's host have its memory, `shared`, and copy what they hold straight to its place. Those
    elsewhere have None: they send it, a message a bucket, to the leader, which puts it there.
    """

    def __init__(
        self, writes: Sequence[Sequence[Write]], shared: SharedBuckets | None, group: dist.ProcessGroup
    ) -> None:
        self._shared, self._group = shared, group
        # wide types first: bytes are viewed in place, at multiples of their width
        self._writes = [sorted(of, key=lambda write: -write.source.itemsize) for of in writes]
        far = None if shared else [[_Place.of(write) for write in of] for of in self._writes]
        places: list[list[list[_Place]] | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(places, far, group=group)
        leads = dist.get_rank(group) == 0
        self._far = {rank: of for rank, of in enumerate(places) if of is not None} if leads else {}

    def fill(self, index: int) -> None:
        """Bring what this rank, and as the leader what the far ones hold of bucket `index`."""
        if self._shared is None:
            self._send(index)
            return
        bucket = self._shared.buffer(index)
        for write in self._writes[index]:
            write.run(bucket)
        for rank, places in self._far.items():
            for write in self._receive(rank, places[index], index):
                write.run(bucket)

    def _send(self, index: int) -> None:
        if pieces := self._writes[index]:
            flat = torch.cat([write.source.contiguous().view(-1).view(torch.uint8) for write in pieces])
            try:
                dist.send(flat, group=self._group, group_dst=0)
            except RuntimeError as error:
                raise TransferError(f"bucket {index} did not get to the leader: {error}") from None

    def _receive(self, rank: int, places: Sequence[_Place], index: int) -> list[Write]:
        if not places:
            return []
        sizes = [place.nbytes for place in places]
        flat = torch.empty(sum(sizes), dtype=torch.uint8, device=device_of(self._group))
        try:
            dist.recv(flat, group=self._group, group_src=rank)
        except RuntimeError as error:
            raise TransferError(
                f"what rank {rank} of the replica holds of bucket {index} did not come: {error}"
            ) from None
        return [place.write(raw) for place, raw in zip(places, flat.split(sizes), strict=True)]
