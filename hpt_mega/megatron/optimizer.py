"""Megatron's DistributedDataParallel and optimizer around the model, and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import torch

from hpt_mega.config import Config, OptimizerConfig
from hpt_mega.megatron.model import PolicyModel
from hpt_mega.megatron.precision import gathers_fp8

from megatron.core.distributed import (  # isort: skip  (after model.py has made megatron-core importable)
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer  # isort: skip
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig  # isort: skip
from megatron.core.tensor_parallel import layers  # isort: skip


def wrap_data_parallel(model: PolicyModel, cfg: Config) -> DistributedDataParallel:
    """Gradients are summed (not averaged) over data-parallel ranks in fp32: the objective's denominator
    is already global."""
    _mark_tensor_parallel_weights(model)
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        grad_reduce_in_fp32=True,
        fp8_param_gather=gathers_fp8(cfg.precision.fp8),
    )
    wrapped = DistributedDataParallel(model.config, settings, model)
    model.config.finalize_model_grads_func = _finalize_sums
    return wrapped


def _mark_tensor_parallel_weights(model: PolicyModel) -> None:
    """megatron-core marks weights as split only where it initialises them, which this product never asks
    for; the gradient's norm would leave out unmarked ones on all but the first tensor-parallel rank."""
    for module in model.modules():
        if not isinstance(module, _SPLIT_LAYERS) or module.weight is None:
            continue
        if not hasattr(module.weight, "tensor_model_parallel"):
            dim = 1 if isinstance(module, layers.RowParallelLinear) else 0
            layers.set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


_SPLIT_LAYERS = (layers.ColumnParallelLinear, layers.RowParallelLinear, layers.VocabParallelEmbedding)


def _finalize_sums(model: list[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Reduce gradients over the groups; the token count of megatron's schedules is not divided by."""
    finalize_model_grads(model, None, **kwargs)


def build_optimizer(model: DistributedDataParallel, cfg: Config) -> MegatronOptimizer:
    """Adam on fp32 master weights (apex or TE fused where importable); decoupled weight decay on matrices
    only, not on norms and biases."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=cfg.optimizer.lr,
        weight_decay=cfg.optimizer.weight_decay,
        adam_beta1=cfg.optimizer.beta1,
        adam_beta2=cfg.optimizer.beta2,
        clip_grad=cfg.optimizer.clip_grad,
        bf16=cfg.precision.dtype == "bf16",
        params_dtype=model.module.config.params_dtype,
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        fp8_recipe=cfg.precision.fp8.recipe if gathers_fp8(cfg.precision.fp8) else None,
    )
    optimizer = get_megatron_optimizer(settings, [model])
    for group in optimizer.param_groups:  # megatron-core leaves this to its own learning-rate scheduler
        group["weight_decay"] = cfg.optimizer.weight_decay * group["wd_mult"]
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def learning_rate(cfg: OptimizerConfig, step: int, total_steps: int) -> float:
    """The rate of step `step` (from 0): linear warm-up, then constant, linear or cosine decay to
    `min_lr_ratio` of the peak at the last step."""
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    progress = (step - cfg.warmup_steps) / max(1, total_steps - 1 - cfg.warmup_steps)
    remaining = 1 - progress if cfg.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return cfg.lr * (cfg.min_lr_ratio + (1 - cfg.min_lr_ratio) * remaining)


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
