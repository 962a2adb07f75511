"""Weights between a Hugging Face folder and a Megatron model in any layout, a tensor at a time.

Every rank reads what it needs from the folder; on export the ranks that together hold the model once pass
their parts to the first one, which writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.checkpoint.convert import open_megatron
from hpt_mega.checkpoint.hf import HFCheckpoint, HFWriter, check_tensors, copy_companions
from hpt_mega.files import writing_folder
from hpt_mega.megatron import experts
from hpt_mega.megatron.model import PolicyModel
from hpt_mega.megatron.runtime import Layout
from hpt_mega.resharding.mapping import Entry, Family, MappingError, ModelShape
from hpt_mega.resharding.mapping.table import EMBEDDING, compare
from hpt_mega.spec import Spec


def load_hf(
    model: PolicyModel, checkpoint: HFCheckpoint, family: Family, shape: ModelShape, layout: Layout
) -> None:
    """Fill this rank's parameters from a Hugging Face folder, casting to their dtype.

    The layers that predict further tokens (DeepSeek's) are left in the folder: the policy has none, and an
    export does not bring them back. Raises MappingError where the folder, the table and the model do not name
    the same tensors, or where a tensor has another shape than the model's.
    """
    check_tensors(checkpoint, family, shape)
    fill(model, lambda entry: [checkpoint.tensor(name) for name in entry.hf], family, shape, layout)


def load_megatron(
    model: PolicyModel, folder: Path, family: Family, shape: ModelShape, layout: Layout
) -> None:
    """Fill this rank's parameters from a Megatron checkpoint of any layout, casting to their dtype.

    Optimizer, counters and random states in it are not read. Raises MappingError and ValueError as load_hf
    does, FileNotFoundError where the folder holds no weights.
    """
    source = open_megatron(folder)
    compare(f"{family.name} table", (), "checkpoint", source.leftovers(family.entries(shape), shape))
    fill(
        model,
        lambda entry: entry.fusion.split(source.whole(entry, shape), shape),
        family,
        shape,
        layout,
    )


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
    model: PolicyModel,
    family: Family,
    shape: ModelShape,
    out: Path,
    source: Path,
    layout: Layout,
    **context: Any,
) -> None:
    """Write the model as a Hugging Face folder. Every rank of the job calls it, the first one writes.

    `source` is the folder that config, tokenizer and chat template are taken from; `context` changes the
    config as in hf.with_context. `out` appears, or is replaced, only when complete.
    """
    collector = _Collector(model, family, shape, layout)
    if not collector.takes_part:
        return
    if layout.rank != 0:
        for entry in family.entries(shape):
            collector.whole_tensors(entry)
        return
    with (
        writing_folder(out, sole_writer=True) as folder,
        HFWriter(folder, collector.specs(family.entries(shape))) as writer,
    ):
        for entry in family.entries(shape):
            for name, tensor in zip(entry.hf, collector.whole_tensors(entry), strict=True):
                writer.write(name, tensor)
        writer.finish()
        copy_companions(source, folder, collector.dtype, **context)


def own_entries(model: PolicyModel, family: Family, shape: ModelShape) -> list[tuple[Entry, Tensor]]:
    """This rank's parameters (and the buffers a checkpoint holds) with their rows of the table.

    Raises MappingError where a parameter has no row.
    """
    table = {name: entry for entry in family.entries(shape) for name in (entry.megatron, entry.te)}
    tensors = (
        (name, tensor)
        for name, tensor in model.state_dict(keep_vars=True).items()
        if torch.is_tensor(tensor) and not name.endswith("._extra_state")
    )
    named = list(model.in_whole_model(tensors))
    if homeless := [name for name, _ in named if name not in table]:
        raise MappingError(f"the {family.name} table has no row for {', '.join(homeless)}")
    return [(table[name], tensor) for name, tensor in named]


class _Collector:
    """Brings whole tensors to the job's first rank; those that take part ask for equal entries in one order.

    They are the first data-parallel replica and, where experts are spread over several, the first rank to
    hold each expert. Raises MappingError where they together do not hold the whole model.
    """

    def __init__(self, model: PolicyModel, family: Family, shape: ModelShape, layout: Layout) -> None:
        self._mine = {
            entry.megatron: parameter
            for chunk in model.chunks
            for entry, parameter in own_entries(chunk, family, shape)
        }
        self._shape = shape
        self._layout = layout
        self._experts = experts.ranks() if shape.experts else None
        self._holds_experts = self._experts is not None and self._experts.first_copy
        self._is_first_copy = layout.dp_rank == 0 == layout.cp_rank
        self.takes_part = self._is_first_copy or self._holds_experts
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
            whole = self._merge_expert(entry) if entry.expert is not None else self._merge(entry)
            if stage != 0:
                for tensor in whole:
                    dist.send(tensor, layout.stage_rank(0), layout.pp_group)
                return []
            return whole
        return self._receive(entry, stage) if layout.rank == 0 else []

    def _locate(self) -> tuple[dict[str, int], dict[str, Tensor]]:
        """The first pipeline stage that holds each parameter of the model, and a rank's part without data."""
        mine = {name: torch.empty_like(part, device="meta") for name, part in self._mine.items()}
        if self._experts is not None:
            peers: list[dict[str, Tensor]] = [{} for _ in range(self._experts.group.size())]
            dist.all_gather_object(peers, mine, group=self._experts.group)
            mine = {name: part for peer in peers for name, part in peer.items()}
        stages: list[dict[str, Tensor]] = [{} for _ in range(self._layout.pp_size)]
        dist.all_gather_object(stages, mine, group=self._layout.pp_group)
        stage_of: dict[str, int] = {}
        blank: dict[str, Tensor] = {}
        for stage, parts in reversed(list(enumerate(stages))):
            stage_of |= dict.fromkeys(parts, stage)
            blank |= parts
        return stage_of, blank

    def _merge(self, entry: Entry) -> list[Tensor]:
        """On the stage's first rank the whole tensors, from its tensor-parallel ranks' parts."""
        if not self._is_first_copy:
            return []
        part = self._mine[entry.megatron].detach().contiguous()
        shards = [torch.empty_like(part) for _ in range(self._layout.tp_size)]
        dist.all_gather(shards, part, group=self._layout.tp_group)
        if self._layout.tp_rank != 0:
            return []
        return [tensor.contiguous() for tensor in entry.fusion.merge(shards, self._shape)]

    def _merge_expert(self, entry: Entry) -> list[Tensor]:
        """On the stage's first rank the whole tensors, from the ranks that hold the expert."""
        assert self._experts is not None and self._shape.experts is not None and entry.expert is not None
        if not self._holds_experts:
            return []
        group = self._experts.group
        owners = self._experts.owners(entry.expert, self._shape.experts.count)
        mine = self._mine.get(entry.megatron)
        if group.rank() != 0:
            if group.rank() in owners:
                assert mine is not None
                dist.send(mine.detach().contiguous(), dist.get_global_rank(group, 0), group)
            return []
        shards = []
        for owner in owners:
            if owner == 0:
                assert mine is not None
                shards.append(mine.detach())
                continue
            shards.append(torch.empty_like(self._blank[entry.megatron], device=self._layout.device))
            dist.recv(shards[-1], dist.get_global_rank(group, owner), group)
        return [tensor.contiguous() for tensor in entry.fusion.merge(shards, self._shape)]

    def _receive(self, entry: Entry, stage: int) -> list[Tensor]:
        whole = [torch.empty_like(tensor, device=self._layout.device) for tensor in self._planned(entry)]
        for tensor in whole:
            dist.recv(tensor, self._layout.stage_rank(stage), self._layout.pp_group)
        return whole

    def _planned(self, entry: Entry) -> list[Tensor]:
        size = self._layout.tp_size
        if entry.expert is not None:
            assert self._experts is not None
            size = self._experts.tp_size
        blank = [self._blank[entry.megatron]] * size
        return [tensor.contiguous() for tensor in entry.fusion.merge(blank, self._shape)]
