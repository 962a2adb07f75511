"""The trainer's weights on their way to engines: which rank gives what, and the update from begin to end.

The plan is made once: the parameters keep their memory through training. How bytes move is resharding's.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from hpt_mega.checkpoint.weights import own_entries
from hpt_mega.megatron.model import PolicyModel
from hpt_mega.megatron.runtime import Layout
from hpt_mega.resharding.gather import Gather
from hpt_mega.resharding.manifest import check_names
from hpt_mega.resharding.mapping import Entry, Family, ModelShape
from hpt_mega.resharding.mapping.fusion import Piece
from hpt_mega.resharding.planner import plan_update, plan_writes
from hpt_mega.resharding.transport import Receiver, SharedBuckets, stream
from hpt_mega.spec import Spec

Part = tuple[str, int, int]  # a Megatron parameter, which part of it, of how many


class WeightSync:
    """One replica's policy as a stream of Hugging Face tensors; its ranks make and use it together.

    `model` must be in its final memory: wrapped for data parallelism, with its optimizer built.
    """

    def __init__(
        self, model: PolicyModel, family: Family, shape: ModelShape, layout: Layout, bucket_bytes: int
    ) -> None:
        self._layout = layout
        self._shape = shape
        mine = {
            (entry.megatron, *self._place(entry, model)): (entry, part.detach())
            for chunk in model.chunks
            for entry, part in own_entries(chunk, family, shape)
        }
        holders = self._first_holders({part: Spec.of(tensor) for part, (_, tensor) in mine.items()})
        dtypes = {name: spec.dtype for (name, _, _), (_, spec) in holders.items()}
        entries = list(family.entries(shape))
        check_names(
            [entry.megatron for entry in entries],
            list(dtypes),
            f"parameters of a replica, {family.name} table",
        )
        tensors = {
            name: Spec(dtypes[entry.megatron], hf_shape)
            for entry in entries
            for name, hf_shape in entry.hf_shapes(shape).items()
        }
        self.plan = plan_update(tensors, bucket_bytes)
        rank = dist.get_rank(layout.replica_group)
        given = {part: held for part, held in mine.items() if holders[part][0] == rank}
        writes_by_bucket = plan_writes(self.plan, self._pieces(given))
        self._shared = self._open(bucket_bytes)
        self._gather = Gather(writes_by_bucket, self._shared, layout.replica_group)

    def send(self, engines: Sequence[Receiver], policy_version: int) -> None:
        """Bring the engines, given on the leader only, to the current weights. Raises on all ranks alike."""
        group = self._layout.waiting_group
        stream(self.plan, self._gather.fill, self._shared, group, engines, policy_version)

    @property
    def path(self) -> str:
        """Where a process on the leader's host finds the buckets; the leader knows it."""
        assert self._shared is not None
        return self._shared.path

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()

    def _place(self, entry: Entry, model: PolicyModel) -> tuple[int, int]:
        """Which part of a parameter is this rank's, of how many."""
        if entry.expert is None:
            return self._layout.tp_rank, self._layout.tp_size
        _, expert_rank, expert_size = model.expert_place()
        return expert_rank, expert_size

    def _first_holders(self, mine: dict[Part, Spec]) -> dict[Part, tuple[int, Spec]]:
        """The first rank of the replica that holds each part, and the part's form.

        A tied embedding lies on two pipeline stages; the ranks of a context hold the same.
        """
        ranks: list[dict[Part, Spec]] = [{} for _ in range(dist.get_world_size(self._layout.replica_group))]
        dist.all_gather_object(ranks, mine, group=self._layout.replica_group)
        return {
            part: (rank, spec)
            for rank, parts in reversed(list(enumerate(ranks)))
            for part, spec in parts.items()
        }

    def _pieces(self, given: dict[Part, tuple[Entry, Tensor]]) -> Iterator[tuple[str, Piece]]:
        for (_, rank, _), (entry, tensor) in given.items():
            for piece in entry.fusion.contribution(tensor, self._shape, rank):
                yield entry.hf[piece.tensor], piece

    def _open(self, bucket_bytes: int) -> SharedBuckets | None:
        """The leader's memory, as every rank of the replica sees it; None on other hosts."""
        layout = self._layout
        shared = SharedBuckets.create(bucket_bytes) if layout.is_leader else None
        host = socket.gethostname()
        leader_host, path = layout.broadcast_object((host, shared.path) if shared else None)
        if host != leader_host:
            return None
        return shared or SharedBuckets(path, bucket_bytes)
