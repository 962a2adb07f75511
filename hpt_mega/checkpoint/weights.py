"""Weights between a Hugging Face folder and a Megatron model in any layout, a tensor at a time.

Every rank reads what it needs from the folder; on export the ranks of one replica pass their parts to its
first rank, which writes.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from hpt_mega.checkpoint.hf import HFCheckpoint, HFWriter, copy_companions, writing_folder
from hpt_mega.megatron.model import PolicyModel
from hpt_mega.megatron.runtime import Layout
from hpt_mega.resharding.mapping import Entry, Family, MappingError, ModelShape
from hpt_mega.resharding.mapping.table import canonical_name

SHARD_BYTES = 5 * 1000**3


def load_hf(
    model: PolicyModel, checkpoint: HFCheckpoint, family: Family, shape: ModelShape, layout: Layout
) -> None:
    """Fill this rank's parameters from a Hugging Face folder, casting to their dtype.

    Raises MappingError where the folder, the table and the model do not name the same tensors, or where a
    tensor has another shape than the model's.
    """
    family.check_names(shape, checkpoint.names())
    for entry, parameter in own_entries(model, family, shape):
        tensors = [checkpoint.tensor(name) for name in entry.hf]
        part = entry.fusion.shard(tensors, shape, layout.tp_rank, layout.tp_size)
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
    """Write the model as a Hugging Face folder; all ranks of one replica call it, its first rank writes.

    `source` is the folder that config, tokenizer and chat template are taken from. `out` appears, or is
    replaced, only when complete.
    """
    collector = _Collector(model, family, shape, layout)
    if not layout.is_leader:
        for entry in family.entries(shape):
            collector.whole_tensors(entry)
        return
    with writing_folder(out) as folder:
        writer = HFWriter(folder, SHARD_BYTES)
        for entry in family.entries(shape):
            for name, tensor in zip(entry.hf, collector.whole_tensors(entry), strict=True):
                writer.add(name, tensor)
        writer.finish()
        copy_companions(source, folder, collector.dtype)


def own_entries(model: PolicyModel, family: Family, shape: ModelShape) -> list[tuple[Entry, Parameter]]:
    """This pipeline stage's parameters with their rows of the table.

    Raises MappingError where a parameter has no row.
    """
    table = {entry.megatron: entry for entry in family.entries(shape)}
    first_layer = model.decoder.layers[0].layer_number - 1
    named = [
        (canonical_name(name, first_layer, shape.tied), parameter)
        for name, parameter in model.named_parameters()
    ]
    if homeless := [name for name, _ in named if name not in table]:
        raise MappingError(f"the {family.name} table has no row for {', '.join(homeless)}")
    return [(table[name], parameter) for name, parameter in named]


class _Collector:
    """Brings whole tensors to the first rank of a replica; its ranks ask for equal entries in one order."""

    def __init__(self, model: PolicyModel, family: Family, shape: ModelShape, layout: Layout) -> None:
        self._mine = {entry.megatron: parameter for entry, parameter in own_entries(model, family, shape)}
        self._shape = shape
        self._layout = layout
        some = next(iter(self._mine.values()))
        self.dtype, self._device = some.dtype, some.device
        self._stage_of, self._shard_shape = self._locate()

    def whole_tensors(self, entry: Entry) -> list[Tensor]:
        """The entry's Hugging Face tensors on the replica's first rank; elsewhere nothing."""
        layout, stage = self._layout, self._stage_of[entry.megatron]
        if layout.pp_rank == stage:
            whole = self._merge(entry)
            if layout.tp_rank == 0 and stage != 0:
                for tensor in whole:
                    dist.send(tensor, layout.stage_rank(0), layout.pp_group)
            return whole if layout.is_leader else []
        return self._receive(entry, stage) if layout.is_leader else []

    def _locate(self) -> tuple[dict[str, int], dict[str, torch.Size]]:
        """The first pipeline stage that holds each parameter of the model, and the shape of a rank's part."""
        stages: list[dict[str, torch.Size]] = [{} for _ in range(self._layout.pp_size)]
        mine = {name: parameter.shape for name, parameter in self._mine.items()}
        dist.all_gather_object(stages, mine, group=self._layout.pp_group)
        stage_of: dict[str, int] = {}
        shard_shape: dict[str, torch.Size] = {}
        for stage, shapes in reversed(list(enumerate(stages))):
            stage_of |= dict.fromkeys(shapes, stage)
            shard_shape |= shapes
        return stage_of, shard_shape

    def _merge(self, entry: Entry) -> list[Tensor]:
        part = self._mine[entry.megatron].detach().contiguous()
        shards = [torch.empty_like(part) for _ in range(self._layout.tp_size)]
        dist.all_gather(shards, part, group=self._layout.tp_group)
        return [tensor.contiguous() for tensor in entry.fusion.merge(shards, self._shape)]

    def _receive(self, entry: Entry, stage: int) -> list[Tensor]:
        blank = torch.empty(self._shard_shape[entry.megatron], device="meta")
        planned = entry.fusion.merge([blank] * self._layout.tp_size, self._shape)
        whole = [torch.empty(tensor.shape, dtype=self.dtype, device=self._device) for tensor in planned]
        for tensor in whole:
            dist.recv(tensor, self._layout.stage_rank(stage), self._layout.pp_group)
        return whole
