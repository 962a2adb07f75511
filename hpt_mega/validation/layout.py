"""Whether the model divides over the ranks of the layout, and whether the machine has them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hpt_mega.config import Config


def tensor(cfg: Config, shape: Mapping[str, Any], on_gpu: bool) -> Iterator[str]:
    """Whether heads and rows divide over tensor-parallel ranks; context parallelism."""
    parallel = cfg.parallel
    if parallel.sequence_parallel and parallel.tp == 1:
        yield "parallel.sequence_parallel needs tensor parallelism and parallel.tp is 1; set tp above 1"
    heads = shape.get("num_attention_heads")
    for what, count in (
        ("attention heads", heads),
        ("key/value heads", shape.get("num_key_value_heads", heads)),
        ("feed-forward rows", shape.get("intermediate_size")),
    ):
        if count and parallel.tp > 0 and count % parallel.tp:
            fitting = divisors(count, heads)
            yield f"parallel.tp is {parallel.tp} and the model has {count} {what}; expected one of {fitting}"
    if parallel.cp > 1 and "kv_lora_rank" in shape and not on_gpu:
        yield f"parallel.cp is {parallel.cp}; latent attention has no context parallelism on the CPU, set 1"
    if parallel.cp > 1 and cfg.precision.dtype == "fp32" and on_gpu:
        yield (
            f"parallel.cp is {parallel.cp} and precision.dtype fp32; Transformer Engine's attention shares a "
            "context over GPUs in bf16 and fp16 only, choose one of these or set cp to 1"
        )
    if parallel.cp > 1 and on_gpu and shape.get("sliding_window") and shape.get("model_type") in _WINDOWED:
        yield (
            f"parallel.cp is {parallel.cp} and the model has a sliding window; Transformer Engine's "
            "attention does not share such a context over GPUs as it is called here, set cp to 1"
        )


_WINDOWED = ("mistral", "mixtral")  # families whose sliding_window is in use wherever it is given


def pipeline(cfg: Config, shape: Mapping[str, Any]) -> Iterator[str]:
    """Whether every chunk of the pipeline gets layers."""
    parallel, layers = cfg.parallel, shape.get("num_hidden_layers")
    if parallel.vpp > 1 and parallel.pp == 1:
        yield f"parallel.vpp is {parallel.vpp} and parallel.pp is 1; an interleaved pipeline needs pp above 1"
    if min(parallel.pp, parallel.vpp) < 1 or not layers:
        return
    chunks = parallel.pp * parallel.vpp
    if parallel.stage_layers:
        given = parallel.stage_layers
        if len(given) != chunks or sum(given) != layers or min(given) < 1:
            yield (
                f"parallel.stage_layers is {given}; expected parallel.pp x vpp = {chunks} numbers above 0 "
                f"that add up to the model's {layers} layers"
            )
    elif chunks > layers:
        yield (
            f"parallel.pp x vpp is {parallel.pp} x {parallel.vpp} = {chunks} and the model has {layers} "
            "layers; each chunk needs one"
        )


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")  # of Qwen, Mixtral, DeepSeek


def experts(cfg: Config, shape: Mapping[str, Any]) -> Iterator[str]:
    """Whether the experts divide over their ranks."""
    parallel = cfg.parallel
    count = _expert_count(shape)
    if count is None:
        for key in ("ep", "etp"):
            if getattr(parallel, key) > 1:
                yield f"parallel.{key} is {getattr(parallel, key)} and the model has no experts; set 1"
        return
    if min(parallel.tp, parallel.cp, parallel.dp, parallel.ep, parallel.etp) < 1:
        return
    if count % parallel.ep:
        fitting = divisors(count, count)
        yield f"parallel.ep is {parallel.ep} and the model has {count} experts; expected one of {fitting}"
    ranks, wanted = parallel.tp * parallel.cp * parallel.dp, parallel.ep * parallel.etp
    if ranks % wanted:
        yield (
            f"parallel.ep x etp is {parallel.ep} x {parallel.etp} = {wanted} and its ranks are those of tp x "
            f"cp x dp = {ranks}; expected a divisor of that"
        )
    rows = shape.get("moe_intermediate_size") or shape.get("intermediate_size") or 0
    if rows % parallel.etp:
        fitting = divisors(rows, ranks)
        yield f"parallel.etp is {parallel.etp} and an expert has {rows} rows; expected one of {fitting}"
    if cfg.rollout.engine == "megatron" and wanted > 1 and parallel.vpp > 1:
        yield (
            f"rollout.engine=megatron cannot decode with parallel.vpp={parallel.vpp} where the experts have "
            f"parallel.ep x etp = {wanted} ranks: these would meet in different layers; set vpp to 1, or both"
        )


def trained_experts(cfg: Config, shape: Mapping[str, Any]) -> Iterator[str]:
    """Whether megatron-core trains the experts in this layout."""
    if _expert_count(shape) and cfg.parallel.tp > 1 and not cfg.parallel.sequence_parallel:
        yield (
            f"the model has experts and parallel.tp is {cfg.parallel.tp}; megatron-core trains them with "
            "tensor parallelism only together with parallel.sequence_parallel=true"
        )


def _expert_count(shape: Mapping[str, Any]) -> int | None:
    return next((shape[key] for key in _EXPERT_COUNTS if shape.get(key)), None)


def processes(cfg: Config) -> Iterator[str]:
    """Whether as many processes or GPUs are there as the layout takes."""
    parallel = cfg.parallel
    wanted = parallel.product
    started = os.environ.get("WORLD_SIZE")
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "1")
    if started is not None:
        if started != str(parallel.world_size):
            yield f"WORLD_SIZE is {started} and {wanted}; start as many processes, or change the layout"
    elif nodes != "1":
        yield f"this SLURM job has {nodes} nodes, `hpt train` starts processes on one; use srun torchrun"
    else:
        yield from gpus(cfg)


def gpus(cfg: Config) -> Iterator[str]:
    """Whether this machine, where it has GPUs, has one for each process."""
    if 0 < (here := torch.cuda.device_count()) < cfg.parallel.world_size:
        wanted = cfg.parallel.product
        yield f"{wanted} processes are wanted and this machine has {here} GPUs; lower one of them"


def divisors(number: int, limit: int | None) -> str:
    """The divisors of a number up to a limit, as text: what a layout may be set to."""
    return ", ".join(str(d) for d in range(1, min(number, limit or number) + 1) if number % d == 0)
