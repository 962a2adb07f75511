"""Megatron's DistributedDataParallel and optimizer around the model, and the learning-rate schedule."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from hpt_mega.config import Config, OptimizerConfig
from hpt_mega.megatron.groups import group_of, is_frozen
from hpt_mega.megatron.model import PolicyModel
from hpt_mega.megatron.precision import gathers_fp8
from hpt_mega.megatron.scaler import share_scale

from megatron.core.distributed import (  # isort: skip  (after model.py has made megatron-core importable)
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (  # isort: skip
    ChainedOptimizer,
    MegatronOptimizer,
    get_megatron_optimizer,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig  # isort: skip
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate  # isort: skip
from megatron.core.tensor_parallel import layers  # isort: skip
from megatron.core.transformer.moe.moe_layer import MoELayer  # isort: skip


class DataParallel(DistributedDataParallel):
    """A model chunk with its gradient buffer; the first of a rank knows the others, as PolicyModel does."""

    chunks: tuple[DataParallel, ...]


def wrap_data_parallel(model: PolicyModel, cfg: Config) -> DataParallel:
    """Gradients are summed (not averaged) over data-parallel ranks in fp32: the objective's denominator
    is already global. Parameters that the config freezes get none."""
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        overlap_grad_reduce=cfg.parallel.overlap,
        grad_reduce_in_fp32=True,
        fp8_param_gather=gathers_fp8(cfg.precision.fp8),
    )
    for chunk in model.chunks:
        _mark_tensor_parallel_weights(chunk)
        _mark_experts(chunk)
        for name, parameter in chunk.in_whole_model(chunk.named_parameters()):
            if is_frozen(name, cfg.optimizer.frozen):
                parameter.requires_grad_(False)
    wrapped = [
        DataParallel(model.config, settings, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(model.chunks)
    ]
    wrapped[0].chunks = tuple(wrapped)
    model.config.finalize_model_grads_func = _finalize_sums
    if cfg.parallel.overlap:  # only the last micro-batch's gradients are sent
        waits = [chunk.no_sync for chunk in wrapped]
        model.config.no_sync_func = waits if len(waits) > 1 else waits[0]
    return wrapped[0]


def zero_gradients(model: DataParallel, optimizer: MegatronOptimizer) -> None:
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()


def _mark_tensor_parallel_weights(model: PolicyModel) -> None:
    """megatron-core marks weights as split only where it initialises them, which this product never asks
    for; the gradient's norm would leave out unmarked ones on all but the first tensor-parallel rank."""
    for module in model.modules():
        if not isinstance(module, _SPLIT_LAYERS) or module.weight is None:
            continue
        if not hasattr(module.weight, "tensor_model_parallel"):
            dim = 1 if isinstance(module, layers.RowParallelLinear) else 0
            layers.set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def _mark_experts(model: PolicyModel) -> None:
    """Each rank of tensor parallelism sends other tokens to its experts; where those are whole (etp=1) but
    not spread (ep=1), megatron-core takes their gradients for equal on these ranks and does not add them."""
    for layer in model.decoder.layers:
        if isinstance(layer.mlp, MoELayer):
            for parameter in layer.mlp.experts.parameters():
                parameter.allreduce = False  # over the dense weights' group, but over the experts' own


_SPLIT_LAYERS = (layers.ColumnParallelLinear, layers.RowParallelLinear, layers.VocabParallelEmbedding)


def _finalize_sums(model: list[Any], num_tokens: torch.Tensor | None = None, **kwargs: Any) -> None:
    """Reduce gradients over the groups; the token count of megatron's schedules is not divided by."""
    finalize_model_grads(model, None, **kwargs)


def build_optimizer(model: DataParallel, cfg: Config) -> MegatronOptimizer:
    """Adam on fp32 master weights (apex or TE fused where importable); decoupled weight decay on matrices
    only, not on norms and biases, except where a group of the config says otherwise."""
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=cfg.optimizer.lr,
        weight_decay=cfg.optimizer.weight_decay,
        adam_beta1=cfg.optimizer.beta1,
        adam_beta2=cfg.optimizer.beta2,
        adam_eps=cfg.optimizer.eps,
        clip_grad=cfg.optimizer.clip_grad,
        bf16=cfg.precision.dtype == "bf16",
        fp16=cfg.precision.dtype == "fp16",
        initial_loss_scale=cfg.precision.loss_scale,
        loss_scale_window=cfg.precision.loss_scale_window,
        hysteresis=1,
        optimizer_cpu_offload=cfg.optimizer.cpu_offload > 0,
        optimizer_offload_fraction=cfg.optimizer.cpu_offload,
        # or megatron-core would put other parameters in place of those that it has dealt out over the devices
        use_precision_aware_optimizer=cfg.optimizer.cpu_offload > 0,
        params_dtype=model.module.config.params_dtype,
        use_distributed_optimizer=cfg.parallel.distributed_optimizer,
        fp8_recipe=cfg.precision.fp8.recipe if gathers_fp8(cfg.precision.fp8) else None,
    )
    optimizer = get_megatron_optimizer(settings, list(model.chunks), _overrides(model, cfg.optimizer))
    # where experts alone are trained, the part of the dense weights is empty on every rank: nothing to save
    trained = [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
    if len(trained) < len(optimizer.chained_optimizers):
        optimizer = ChainedOptimizer(trained)
    if settings.fp16:
        share_scale(optimizer)
    model.config.grad_scale_func = optimizer.scale_loss
    return optimizer


def _overrides(model: DataParallel, cfg: OptimizerConfig) -> dict[ParamKey, Any]:
    """The settings of each parameter, in megatron-core's form: a predicate a combination of settings.

    A checkpoint tells groups apart by lr_mult and wd_mult, so these say all; weight_decay itself is written
    by megatron-core's own scheduler, which is not used.
    """
    settings_of: dict[torch.Tensor, tuple[float, float]] = {}
    for chunk in model.chunks:
        for name, parameter in chunk.module.in_whole_model(chunk.module.named_parameters()):
            group = group_of(name, cfg.groups)
            decay = cfg.weight_decay if parameter.dim() > 1 and not name.endswith(".bias") else 0.0
            if group is not None and group.weight_decay is not None:
                decay = group.weight_decay
            settings_of[parameter] = (group.lr_scale if group else 1.0, decay)
    return {
        ParamKey(predicate=ParamPredicate(f"{settings}", partial(_has, settings_of, settings))): {
            "lr_mult": settings[0],
            "wd_mult": settings[1] / (cfg.weight_decay or 1.0),
            "weight_decay": settings[1],
        }
        for settings in sorted(set(settings_of.values()))
    }


def _has(
    settings_of: dict[torch.Tensor, tuple[float, float]],
    settings: tuple[float, float],
    parameter: torch.Tensor,
) -> bool:
    return settings_of[parameter] == settings


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
        group["lr"] = rate * group["lr_mult"]
