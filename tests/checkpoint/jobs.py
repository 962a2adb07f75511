"""What the ranks of a test's job do: build a model at any layout, fill it, compute logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.config import ParallelConfig
from tests.checkpoint.families import PROMPT


@dataclass(frozen=True)
class Job:
    """A layout of Megatron's, beyond what hpt_mega trains at."""

    tp: int = 1
    pp: int = 1
    cp: int = 1  # copies: their context is not cut
    vpp: int | None = None
    ep: int = 1
    etp: int | None = None
    first_stage: int | None = None  # layers of the first pipeline stage; None for equal stages

    @property
    def world_size(self) -> int:
        return self.pp * max(self.tp * self.cp, self.ep * (self.etp or self.tp))

    def __str__(self) -> str:
        uneven = f"first{self.first_stage}" if self.first_stage else ""
        experts = f"ep{self.ep}etp{self.etp or self.tp}"
        return f"tp{self.tp}pp{self.pp}cp{self.cp}vpp{self.vpp or 1}{experts}{uneven}"


def start(job: Job) -> Any:
    """Join the job; returns this rank's hpt_mega Layout."""
    from hpt_mega.megatron import cpu

    cpu.install()
    from megatron.core import parallel_state as ps
    from megatron.core import tensor_parallel

    from hpt_mega.megatron.runtime import Layout

    dist.init_process_group("gloo")
    ps.initialize_model_parallel(
        tensor_model_parallel_size=job.tp,
        pipeline_model_parallel_size=job.pp,
        context_parallel_size=job.cp,
        virtual_pipeline_model_parallel_size=job.vpp,
        expert_model_parallel_size=job.ep,
        expert_tensor_parallel_size=job.etp,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    return Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=ps.get_tensor_model_parallel_rank(),
        tp_size=job.tp,
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        pp_size=job.pp,
        dp_rank=ps.get_data_parallel_rank(),
        dp_size=ps.get_data_parallel_world_size(),
        tp_group=ps.get_tensor_model_parallel_group(),
        pp_group=ps.get_pipeline_model_parallel_group(),
        dp_group=ps.get_data_parallel_group(),
        cp_rank=ps.get_context_parallel_rank(),
        cp_size=job.cp,
        cp_group=ps.get_context_parallel_group(),
        replica_group=ps.get_model_parallel_group(),
        waiting_group=ps.get_model_parallel_group(),
    )


def build_chunks(shape: Any, job: Job, dtype: torch.dtype = torch.float32) -> list[Any]:
    """This rank's model chunks: one, or as many as the pipeline is interleaved."""
    from hpt_mega.megatron.model import build_stage, transformer_config

    config = transformer_config(shape, ParallelConfig(tp=job.tp, pp=job.pp), dtype)
    config.expert_model_parallel_size = job.ep
    config.expert_tensor_parallel_size = job.etp or job.tp
    config.virtual_pipeline_model_parallel_size = job.vpp
    config.num_layers_in_first_pipeline_stage = job.first_stage
    config.variable_seq_lengths = True
    chunks = [
        build_stage(shape, config, job.tp, vp_stage=chunk if job.vpp else None)
        for chunk in range(job.vpp or 1)
    ]
    chunks[0].chunks = tuple(chunks)  # as build_model does
    return chunks


def logits(chunks: list[Any], layout: Any, shape: Any, tokens: Tensor = PROMPT) -> Tensor:
    """[B, S, V] on every rank of the last stage; an empty tensor elsewhere."""
    length = tokens.shape[1]
    hidden = torch.empty(length, len(tokens), shape.hidden_size)
    last = len(chunks) - 1
    group = layout.pp_group
    before, after = ((layout.pp_rank + step) % layout.pp_size for step in (-1, 1))
    with torch.no_grad():
        for number, chunk in enumerate(chunks):
            with chunk.inference():
                if number or layout.pp_rank != 0:
                    if layout.pp_size > 1:
                        dist.recv(hidden, layout.stage_rank(before), group)
                    chunk.set_input_tensor(hidden)
                hidden = chunk(tokens, torch.arange(length)[None], None).contiguous()
                if not (number == last and layout.is_last_stage) and layout.pp_size > 1:
                    dist.send(hidden, layout.stage_rank(after), group)
        if not layout.is_last_stage:
            return torch.empty(0)
        part = (hidden.transpose(0, 1) @ chunks[-1].output_weight().t()).contiguous()
        shards = [torch.empty_like(part) for _ in range(layout.tp_size)]
        dist.all_gather(shards, part, group=layout.tp_group)
        return torch.cat(shards, dim=-1)[..., : shape.vocab_size]
