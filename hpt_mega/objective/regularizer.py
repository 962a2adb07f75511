"""The two terms a loss may carry besides the estimator: KL to the reference model, and an entropy bonus."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpt_mega.objective.batch import TokenBatch
from hpt_mega.objective.options import Options
from hpt_mega.objective.reference import LOG_RATIO_LIMIT


def k1(delta: Tensor) -> Tensor:
    """-delta: unbiased as an estimate of KL, its gradient has mean 0."""
    return -delta


def k2(delta: Tensor) -> Tensor:
    """delta² / 2: its gradient is that of KL(π_θ || π_ref) on rollouts of π_θ."""
    return delta.square() / 2


def k3(delta: Tensor) -> Tensor:
    """exp(delta) - delta - 1: never negative (GRPO, arXiv 2402.03300)."""
    value = delta.detach()
    return torch.exp(value.clamp(max=LOG_RATIO_LIMIT) + (delta - value)) - delta - 1


PLACES = ("loss", "reward")
KL_FORMS: dict[str, Callable[[Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}


def regularizer(batch: TokenBatch, options: Options) -> Tensor:
    """[B, T]: kl_coef * KL(delta = log π_ref - log π_θ) - entropy_coef * entropy; KL only if in the loss."""
    total = torch.zeros_like(batch.logp)
    if options.kl_coef and options.kl_in == "loss":
        delta = batch.require("ref_logp", "kl_coef") - batch.logp
        total = total + options.kl_coef * KL_FORMS[options.kl_form](delta)
    if options.entropy_coef:
        total = total - options.entropy_coef * batch.require("entropy", "entropy_coef")
    return total


def penalises_reward(options: Options) -> bool:
    """Whether the KL to the reference model is subtracted from the reward."""
    return bool(options.kl_coef) and options.kl_in == "reward"


def kl_penalty(batch: TokenBatch, options: Options) -> Tensor:
    """[B, T] detached: kl_coef * KL per token, of the policy that sampled (old_logp, else logp).

    InstructGPT (arXiv 2203.02155) and RLOO (arXiv 2402.14740) subtract its k1 form from the reward.
    """
    sampled = batch.logp if batch.old_logp is None else batch.old_logp
    delta = batch.require("ref_logp", "kl_in 'reward'") - sampled
    return options.kl_coef * KL_FORMS[options.kl_form](delta).detach()
