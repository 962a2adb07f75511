"""Part 2 of the estimator: the stabilization mask m [B, T], detached, that multiplies the advantage.

A row names one function, or several joined by "+", whose product is taken ("clip+truncated_token").
Corrections of the trainer/engine gap: truncated_, masked_ or reject_ with token, sequence or geometric.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from hpt_mega.objective.batch import TokenBatch
from hpt_mega.objective.options import Options
from hpt_mega.objective.reference import LOG_RATIO_LIMIT, sequence

# (log(π_θ / π_ref) [B, T], advantage [B, T], batch, options) -> m [B, T]
Stabilizer = Callable[[Tensor, Tensor, TokenBatch, Options], Tensor]


def none(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
    """m = 1."""
    return torch.ones_like(log_ratio)


def clip(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
    """0 where min(r A, clip(r, 1 - low, 1 + high) A) is its clipped branch (PPO; DAPO with high > low)."""
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


def sequence_clip(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
    """clip of s = (π_θ(τ) / π_old(τ))^(1/|τ|): whole sequences are masked (GSPO, arXiv 2507.18071)."""
    return clip(sequence(batch), advantage, batch, options)


def entropy_sft(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
    """entropy_sft · exp(-H), H the sequence's mean entropy: imitate where sure (SRFT, 2506.19767)."""
    return options.entropy_sft * torch.exp(-_mean_entropy(batch))[:, None].expand_as(log_ratio)


def entropy_rl(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
    """entropy_rl · exp(H) where A > 0, else 1: reinforce success where unsure (SRFT, arXiv 2506.19767)."""
    weight = options.entropy_rl * torch.exp(_mean_entropy(batch).clamp(max=LOG_RATIO_LIMIT))
    return torch.where(advantage > 0, weight[:, None], 1.0)


def _mean_entropy(batch: TokenBatch) -> Tensor:
    entropy = batch.require("entropy", "a weight by entropy").detach()
    return entropy.sum(1) / batch.lengths.clamp(min=1)


def _truncated(log_weight: Tensor, options: Options) -> Tensor:
    """min(w, correction_high): truncated importance sampling."""
    return log_weight.exp().clamp(max=options.correction_high)


def _masked(log_weight: Tensor, options: Options) -> Tensor:
    """w where it lies in [correction_low, correction_high], else 0: masked importance sampling."""
    weight = log_weight.exp()
    return weight * _inside(weight, options.correction_low, options.correction_high)


def _reject(log_weight: Tensor, options: Options) -> Tensor:
    """1 where w lies in [reject_low, reject_high], else 0: rejection without a weight."""
    return _inside(log_weight.exp(), options.reject_low, options.reject_high).to(log_weight.dtype)


def _inside(weight: Tensor, low: float, high: float) -> Tensor:
    return (weight >= low) & (weight <= high)


def _of_token(batch: TokenBatch) -> Tensor:
    """w = π_old / π_engine of the token."""
    return _engine_gap(batch).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def _of_sequence(batch: TokenBatch) -> Tensor:
    """w = the product of π_old / π_engine over the sequence."""
    gap = _engine_gap(batch)
    return gap.sum(1).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)[:, None].expand_as(gap)


def _of_geometric(batch: TokenBatch) -> Tensor:
    """w = the geometric mean of π_old / π_engine over the sequence."""
    gap = _engine_gap(batch)
    mean = gap.sum(1) / batch.lengths.clamp(min=1)
    return mean.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)[:, None].expand_as(gap)


def _engine_gap(batch: TokenBatch) -> Tensor:
    """[B, T] log(π_old / π_engine); 0 of demonstrations, which no engine wrote."""
    why = "a correction of the trainer/engine gap"
    gap = (batch.require("old_logp", why) - batch.require("rollout_logp", why)).detach()
    return torch.where(batch.offline[:, None], 0.0, gap)


def _correction(
    rule: Callable[[Tensor, Options], Tensor], level: Callable[[TokenBatch], Tensor]
) -> Stabilizer:
    def correct(log_ratio: Tensor, advantage: Tensor, batch: TokenBatch, options: Options) -> Tensor:
        return rule(level(batch), options)

    correct.__doc__ = f"{rule.__doc__} {level.__doc__}"
    return correct


_RULES = {"truncated": _truncated, "masked": _masked, "reject": _reject}
_LEVELS = {"token": _of_token, "sequence": _of_sequence, "geometric": _of_geometric}

STABILIZERS: dict[str, Stabilizer] = {
    "none": none,
    "clip": clip,
    "dual_clip": dual_clip,
    "sequence_clip": sequence_clip,
    "cis_mask": cis_mask,
    "entropy_sft": entropy_sft,
    "entropy_rl": entropy_rl,
    **{f"{rule}_{level}": _correction(_RULES[rule], _LEVELS[level]) for rule in _RULES for level in _LEVELS},
}
