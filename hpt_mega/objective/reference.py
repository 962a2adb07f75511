"""Part 1 of the estimator: the reference policy π_ref that divides the likelihood.

Each function returns log(π_θ / π_ref) [B, T], detached: the ratio is what the estimator and the stabilizers
use, and a difference taken once keeps its digits where log-probabilities are large.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpt_mega.objective.batch import TokenBatch

LOG_RATIO_LIMIT = 60.0  # e^60 times any advantage is finite in fp32; beyond it a ratio says nothing more

Reference = Callable[[TokenBatch], Tensor]


def current(batch: TokenBatch) -> Tensor:
    """π_ref = sg(π_θ): the gradient is ∇log π_θ (SFT, REINFORCE)."""
    return torch.zeros_like(batch.logp).detach()


def old(batch: TokenBatch) -> Tensor:
    """π_ref = π_old: the importance ratio of PPO (arXiv 1707.06347)."""
    return _limit(batch.logp.detach() - batch.require("old_logp", "reference 'old'"))


def one(batch: TokenBatch) -> Tensor:
    """π_ref = 1: the gradient is ∇π_θ (offline parts of LUFFY, arXiv 2504.14945, and SRFT, 2506.19767)."""
    return _limit(batch.logp.detach())


def sequence(batch: TokenBatch) -> Tensor:
    """π_ref = π_θ / s with s = (π_θ(τ) / π_old(τ))^(1/|τ|): GSPO's sequence ratio (arXiv 2507.18071)."""
    log_ratio = batch.logp.detach() - batch.require("old_logp", "reference 'sequence'")
    mean = log_ratio.sum(1) / batch.lengths.clamp(min=1)
    return _limit(mean[:, None].expand_as(log_ratio))


def _limit(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).detach()


REFERENCES: dict[str, Reference] = {"current": current, "old": old, "one": one, "sequence": sequence}
