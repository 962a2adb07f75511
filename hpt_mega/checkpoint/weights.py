"""Weights between a Hugging Face folder and a Megatron model in any layout, a tensor at a time.

Every rank reads what it needs from the folder; on export the ranks of one replica pass their parts to its
first rank, which writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.checkpoint.hf import HFCheckpoint, HFWriter, copy_companions, writing_folder
from hpt_mega.checkpoint.safetensors import Spec
from hpt_mega.megatron.model import PolicyModel
from hpt_mega.megatron.runtime import Layout
from hpt_mega.resharding.mapping import Entry, Family, MappingError, ModelShape
from hpt_mega.resharding.mapping.table import EMBEDDING, canonical_name, compare


def load_hf(
    model: PolicyModel, checkpoint: HFCheckpoint, family: Family, shape: ModelShape, layout: Layout
) -> None:
    """Fill this rank's parameters from a Hugging Face folder, casting to their dtype.

    Raises MappingError where the folder, the table and the model do not name the same tensors, or where a
    tensor has another shape than the model's.
    """
    family.check_names(shape, checkpoint.names())
    family.check_shapes(shape, lambda name: checkpoint.spec(name).shape)
    fill(model, lambda entry: [checkpoint.tensor(name) for name in entry.hf], family, shape, layout)


def fill(
    model: PolicyModel,
    tensors_of: Callable[[Entry], list[Tensor]],
    family: Family,
    shape: ModelShape,
    layout: Layout,
) -> None:
    """Fill this rank's parameters from whole Hugging Face tensors, wherever they come from."""
    for chunk in model.chunks:
        _fill_chunk(chunk, tensors_of, family, shape, layout)


def _fill_chunk(
    model: PolicyModel,
    tensors_of: Callable[[Entry], list[Tensor]],
    family: Family,
    shape: ModelShape,
    layout: Layout,
) -> None:
    _, expert_rank, expert_size = model.expert_place()
    for entry, parameter in own_entries(model, family, shape):
        tensors = tensors_of(entry)
        rank, size = layout.tp_rank, layout.tp_size
        if entry.expert is not None:
            rank, size = expert_rank, expert_size
        elif len(tensors) == 1 and tensors[0].shape == parameter.shape:
            rank, size = 0, 1  # held whole: Transformer Engine does not cut latent attention's projections
        part = entry.fusion.shard(tensors, shape, rank, size)
        if part.shape != parameter.shape:
            raise MappingError(
                f"{' + '.join(entry.hf)} give {list(part.shape)} for {entry.megatron}, expected "
                f"{list(parameter.shape)}; do config.json and the weights belong together?"
            )
        with torch.no_grad():
            parameter.copy_(part)


def export_hf(
    model: PolicyModel, family: Family, shape: ModelShape, out: Path, source: Path, layout: Layout
) -> None:
    """Write the model as a Hugging Face folder; all ranks of the job call it, the first one writes.

    `source` is the folder that config, tokenizer and chat template are taken from. `out` appears, or is
    replaced, only when complete.
    """
    collector = _Collector(model, family, shape, layout)
    if layout.rank != 0:
        for entry in family.entries(shape):
            collector.whole_tensors(entry)
        return
    with writing_folder(out) as folder, HFWriter(folder, collector.specs(family.entries(shape))) as writer:
        for entry in family.entries(shape):
            for name, tensor in zip(entry.hf, collector.whole_tensors(entry), strict=True):
                writer.write(name, tensor)
        writer.finish()
        copy_companions(source, folder, collector.dtype)


def own_entries(model: PolicyModel, family: Family, shape: ModelShape) -> list[tuple[Entry, Tensor]]:
    """This rank's parameters (and the buffers a checkpoint holds) with their rows of the table.

    Raises MappingError where a parameter has no row.
    """
    table = {name: entry for entry in family.entries(shape) for name in (entry.megatron, entry.te)}
    first_expert, _, _ = model.expert_place()
    named = [
        (canonical_name(name, model.first_layer, first_expert, shape.tied), tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if torch.is_tensor(tensor) and not name.endswith("._extra_state")
    ]
    if homeless := [name for name, _ in named if name not in table]:
        raise MappingError(f"the {family.name} table has no row for {', '.join(homeless)}")
    return [(table[name], tensor) for name, tensor in named]


class _Collector:
    """Brings whole tensors to the job's first rank; all ranks ask for equal entries in one order.

    Raises MappingError where the ranks together do not hold the whole model.
    """

    def __init__(self, model: PolicyModel, family: Family, shape: ModelShape, layout: Layout) -> None:
        self._mine = {
            entry.megatron: parameter
            for chunk in model.chunks
            for entry, parameter in own_entries(chunk, family, shape)
        }
        self._shape = shape
        self._layout = layout
        self._expert_groups = model.expert_groups()
        self._stage_of, self._blank = self._locate()
        compare(
            f"{family.name} table",
            {entry.megatron for entry in family.entries(shape)},
            "parameters of the job's ranks",
            self._blank.keys(),
        )
        self.dtype = self._blank[EMBEDDING].dtype

    def specs(self, entries: Iterable[Entry]) -> dict[str, Spec]:
        """What whole_tensors() gives for these entries, by name."""
        return {
            name: Spec.of(tensor)
            for entry in entries
            for name, tensor in zip(entry.hf, self._planned(entry), strict=True)
        }

    def whole_tensors(self, entry: Entry) -> list[Tensor]:
        """The entry's Hugging Face tensors on the job's first rank; elsewhere nothing."""
        layout, stage = self._layout, self._stage_of[entry.megatron]
        if layout.pp_rank == stage:
            whole = self._merge(entry) if entry.expert is None else self._merge_expert(entry)
            if layout.stage_rank(0) == 0 and stage != 0:
                for tensor in whole:
                    dist.send(tensor, 0, layout.pp_group)
            return whole if layout.rank == 0 else []
        return self._receive(entry, stage) if layout.rank == 0 else []

    def _locate(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """The first pipeline stage that holds each parameter of the model, and a rank's part without data."""
        stages: list[dict[str, Tensor]] = [{} for _ in range(self._layout.pp_size)]
        mine = {name: torch.empty_like(part, device="meta") for name, part in self._mine.items()}
        if self._expert_groups:
            sharing: list[dict[str, Tensor]] = [{} for _ in range(self._expert_groups[1].size())]
            dist.all_gather_object(sharing, mine, group=self._expert_groups[1])
            mine = {name: part for parts in sharing for name, part in parts.items()}
        dist.all_gather_object(stages, mine, group=self._layout.pp_group)
        stage_of: dict[str, int] = {}
        blank: dict[str, Tensor] = {}
        for stage, parts in reversed(list(enumerate(stages))):
            stage_of |= dict.fromkeys(parts, stage)
            blank |= parts
        return stage_of, blank

    def _merge(self, entry: Entry) -> list[Tensor]:
        part = self._mine[entry.megatron].detach().contiguous()
        shards = [torch.empty_like(part) for _ in range(self._layout.tp_size)]
        dist.all_gather(shards, part, group=self._layout.tp_group)
        return [tensor.contiguous() for tensor in entry.fusion.merge(shards, self._shape)]

    def _merge_expert(self, entry: Entry) -> list[Tensor]:
        """Its owners among the expert-parallel ranks put it together and send it to the others."""
        assert (
            self._expert_groups is not None and self._shape.experts is not None and entry.expert is not None
        )
        tensor_group, expert_group = self._expert_groups
        if entry.megatron in self._mine:
            part = self._mine[entry.megatron].detach().contiguous()
            shards = [torch.empty_like(part) for _ in range(tensor_group.size())]
            dist.all_gather(shards, part, group=tensor_group)
            whole = [tensor.contiguous() for tensor in entry.fusion.merge(shards, self._shape)]
        else:
            device = next(iter(self._mine.values())).device
            whole = [torch.empty_like(tensor, device=device) for tensor in self._planned(entry)]
        if expert_group.size() > 1:
            owner = entry.expert * expert_group.size() // self._shape.experts.count
            for tensor in whole:
                dist.broadcast(tensor, dist.get_global_rank(expert_group, owner), group=expert_group)
        return whole

    def _receive(self, entry: Entry, stage: int) -> list[Tensor]:
        device = next(iter(self._mine.values())).device
        whole = [torch.empty_like(tensor, device=device) for tensor in self._planned(entry)]
        for tensor in whole:
            dist.recv(tensor, self._layout.stage_rank(stage), self._layout.pp_group)
        return whole

    def _planned(self, entry: Entry) -> list[Tensor]:
        shards = self._layout.tp_size
        if entry.expert is not None and self._expert_groups is not None:
            shards = self._expert_groups[0].size()
        blank = [self._blank[entry.megatron]] * shards
        return [tensor.contiguous() for tensor in entry.fusion.merge(blank, self._shape)]
