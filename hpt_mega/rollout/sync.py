"""The trainer's weights on their way to engines: which rank gives what, and the update from begin to end.

The plan is made once: the parameters keep their memory through training. How bytes move is resharding's.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from hpt_mega.checkpoint.safetensors import Spec
from hpt_mega.checkpoint.weights import own_entries
from hpt_mega.megatron.model import PolicyModel
from hpt_mega.megatron.runtime import Layout
from hpt_mega.resharding.gather import Gather
from hpt_mega.resharding.manifest import check_names
from hpt_mega.resharding.mapping import Entry, Family, ModelShape
from hpt_mega.resharding.mapping.fusion import Piece
from hpt_mega.resharding.planner import plan_update, plan_writes
from hpt_mega.resharding.transport import Receiver, SharedBuckets, stream


class WeightSync:
    """One replica's policy as a stream of Hugging Face tensors; its ranks make and use it together.

    `model` must be in its final memory: wrapped for data parallelism, with its optimizer built.
    """

    def __init__(
        self, model: PolicyModel, family: Family, shape: ModelShape, layout: Layout, bucket_bytes: int
    ) -> None:
        self._layout = layout
        self._shape = shape
        mine = [entry for chunk in model.chunks for entry in own_entries(chunk, family, shape)]
        stages = self._first_stages({entry.megatron: Spec.of(part) for entry, part in mine})
        entries = list(family.entries(shape))
        check_names(
            [entry.megatron for entry in entries],
            list(stages),
            f"parameters of a replica, {family.name} table",
        )
        tensors = {
            name: Spec(stages[entry.megatron][1].dtype, hf_shape)
            for entry in entries
            for name, hf_shape in entry.hf_shapes(shape).items()
        }
        self.plan = plan_update(tensors, bucket_bytes)
        writes = layout.cp_rank == 0  # the other ranks of a context hold the same
        held = [pair for pair in mine if writes and stages[pair[0].megatron][0] == layout.pp_rank]
        writes_by_bucket = plan_writes(self.plan, self._pieces(held, model))
        self._shared = self._open(bucket_bytes)
        self._gather = Gather(writes_by_bucket, self._shared, layout.replica_group)

    def send(self, engines: Sequence[Receiver], policy_version: int) -> None:
        """Bring the engines, given on the leader only, to the current weights. Raises on all ranks alike."""
        group = self._layout.replica_group
        stream(self.plan, self._gather.fill, self._shared, group, engines, policy_version)

    @property
    def path(self) -> str:
        """Where a process on the leader's host finds the buckets; the leader knows it."""
        assert self._shared is not None
        return self._shared.path

    def close(self) -> None:
        if self._shared is not None:
            self._shared.close()

    def _first_stages(self, mine: dict[str, Spec]) -> dict[str, tuple[int, Spec]]:
        """The first pipeline stage that holds each parameter (a tied embedding lies on two), and its form."""
        stages: list[dict[str, Spec]] = [{} for _ in range(self._layout.pp_size)]
        dist.all_gather_object(stages, mine, group=self._layout.pp_group)
        return {
            name: (stage, spec)
            for stage, parts in reversed(list(enumerate(stages)))
            for name, spec in parts.items()
        }

    def _pieces(
        self, held: Sequence[tuple[Entry, Tensor]], model: PolicyModel
    ) -> Iterator[tuple[str, Piece]]:
        _, expert_rank, expert_size = model.expert_place()
        for entry, part in held:
            place = (self._layout.tp_rank, self._layout.tp_size)
            if entry.expert is not None:
                place = (expert_rank, expert_size)
            for piece in entry.fusion.contribution(part.detach(), self._shape, *place):
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
