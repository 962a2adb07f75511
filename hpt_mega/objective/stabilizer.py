"""Part 2 of the estimator: the stabilization mask m [B, T], detached, that multiplies the advantage.

A row names one function, or several joined by "+", whose product is taken ("clip+truncated_token").
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hpt_mega.objective.batch import TokenBatch
from hpt_mega.objective.options import Options
from hpt_mega.objective.reference import LOG_RATIO_LIMIT

# (log(π_θ / π_ref) [B, T], advantage [B, T], batch, options) -> m [B, T]
Stabilizer = Callable[[Tensor, Tensor, TokenBatch, Options], Tensor]


def none(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
    """m = 1."""
    return torch.ones_like(log_ratio)


def clip(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
    """0 where min(r A, clip(r, 1 - low, 1 + high) A) is its clipped branch (PPO; DAPO with high > low).

    With reference 'sequence' r is GSPO's sequence ratio, and whole sequences are clipped.
    """
    ratio = log_ratio.exp()
    too_high = (advantage > 0) & (ratio > 1 + options.clip_high)
    too_low = (advantage < 0) & (ratio < 1 - options.clip_low)
    return (~(too_high | too_low)).to(log_ratio.dtype)


def dual_clip(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
    """clip, and 0 where A < 0 and r > clip_dual (arXiv 1912.09729)."""
    runaway = (advantage < 0) & (log_ratio.exp() > options.clip_dual)
    return clip(log_ratio, advantage, batch, options).masked_fill(runaway, 0.0)


def cis_mask(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
    """clip(r, 1 - low, 1 + high) / r: a clipped weight, a gradient for every token (CISPO, 2506.13585)."""
    low = math.log(1 - options.clip_low) if options.clip_low < 1 else -math.inf
    return (log_ratio.clamp(low, math.log1p(options.clip_high)) - log_ratio).exp()


def truncated_token(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
    """min(w, correction_high) with w = π_old / π_engine of the token (truncated importance sampling)."""
    return _engine_gap(batch).exp().clamp(max=options.correction_high)


def masked_token(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
    """w where it lies in [correction_low, correction_high], else 0 (masked importance sampling)."""
    return _keep_inside(_engine_gap(batch), options)


def truncated_sequence(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
    """min(w(τ), correction_high) with w(τ) the product of w over the sequence."""
    return _over_sequence(batch, mean=False).exp().clamp(max=options.correction_high)


def masked_sequence(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
    """w(τ) where it lies in [correction_low, correction_high], else 0."""
    return _keep_inside(_over_sequence(batch, mean=False), options)


def masked_geometric(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
    """1 where the geometric mean of w over the sequence lies in the interval, else 0: it is rejected."""
    return (_keep_inside(_over_sequence(batch, mean=True), options) > 0).to(log_ratio.dtype)


def _engine_gap(batch: TokenBatch) -> Tensor:
    why = "a correction of the trainer/engine gap"
    gap = batch.require("old_logp", why) - batch.require("rollout_logp", why)
    return gap.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).detach()


def _over_sequence(batch: TokenBatch, mean: bool) -> Tensor:
    gap = _engine_gap(batch)
    total = gap.sum(1) / batch.lengths.clamp(min=1) if mean else gap.sum(1)
    return total.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)[:, None].expand_as(gap)


def _keep_inside(log_weight: Tensor, options: Options) -> Tensor:
    weight = log_weight.exp()
    outside = (weight < options.correction_low) | (weight > options.correction_high)
    return weight.masked_fill(outside, 0.0)


STABILIZERS: dict[str, Stabilizer] = {
    "none": none,
    "clip": clip,
    "dual_clip": dual_clip,
    "cis_mask": cis_mask,
    "truncated_token": truncated_token,
    "masked_token": masked_token,
    "truncated_sequence": truncated_sequence,
    "masked_sequence": masked_sequence,
    "masked_geometric": masked_geometric,
}
