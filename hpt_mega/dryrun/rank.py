"""One rank of a job, built without the job: a fake process group of full size, parameters without data.

What is concluded from the ranks is in examine.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from hpt_mega.checkpoint.weights import fill, own_entries
from hpt_mega.config import ParallelConfig
from hpt_mega.megatron import runtime
from hpt_mega.megatron.model import build_stage, transformer_config
from hpt_mega.megatron.runtime import Layout
from hpt_mega.resharding.mapping import Entry, Family, ModelShape


@dataclass(frozen=True)
class BuiltRank:
    """What a rank holds: entries of the family's table by their Megatron names, and how many numbers."""

    rank: int
    stage: int
    layers: tuple[int, ...]  # indices in the whole model
    entries: dict[str, Entry]
    dense: int  # parameters outside the experts
    experts: int

    @property
    def parameters(self) -> int:
        return self.dense + self.experts


def build_rank(
    rank: int, shape: ModelShape, family: Family, parallel: ParallelConfig, dtype: torch.dtype
) -> BuiltRank:
    """Build the model of one rank and fill it, as training would, from the tensors that the table names.

    Raises MappingError for a parameter without a source or with another shape than its source gives, and
    what megatron-core raises for a layout that it cannot build.
    """
    with fake_job(rank, parallel) as layout, torch.device("meta"):
        config = transformer_config(shape, parallel, dtype)
        stages = range(parallel.vpp) if parallel.vpp > 1 else [None]
        # .to: megatron-core names the device of some buffers (the bias of DeepSeek's router)
        chunks = [build_stage(shape, config, layout.tp_size, stage).to("meta") for stage in stages]
        entries: dict[str, Entry] = {}
        counts = {"dense": 0, "experts": 0}
        for chunk in chunks:
            fill(chunk, lambda entry: _without_data(entry, shape, dtype), family, shape, layout)
            for entry, parameter in own_entries(chunk, family, shape):
                entries[entry.megatron] = entry
                counts["dense" if entry.expert is None else "experts"] += parameter.numel()
        layers = {entry.layer for entry in entries.values() if entry.layer is not None}
        return BuiltRank(rank, layout.pp_rank, tuple(sorted(layers)), entries, **counts)


@contextmanager
def fake_job(rank: int, parallel: ParallelConfig) -> Iterator[Layout]:
    """This process as one rank of a job whose other ranks do not exist; collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=parallel.world_size, store=FakeStore())
    try:
        yield runtime.build_groups(parallel, timedelta(minutes=1))
    finally:
        runtime.shutdown()


def _without_data(entry: Entry, shape: ModelShape, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.empty(size, dtype=dtype, device="meta") for size in entry.hf_shapes(shape).values()]
