"""The equation: four parts put together into a token-level surrogate whose gradient is the estimator.

The parts live in reference.py, stabilizer.py, advantage.py and likelihood.py; sums and denominators in
estimator.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpt_mega.objective.advantage import advantage_of
from hpt_mega.objective.batch import TokenBatch
from hpt_mega.objective.likelihood import LIKELIHOODS
from hpt_mega.objective.options import Options
from hpt_mega.objective.reference import REFERENCES
from hpt_mega.objective.stabilizer import STABILIZERS


@dataclass(frozen=True)
class Parts:
    """The four interchangeable parts, each by its name."""

    advantage: str
    reference: str
    stabilizer: str = "none"
    likelihood: str = "identity"


@dataclass(frozen=True, eq=False)
class Surrogate:
    """The token losses and what they were made of; 0 outside the sequences the parts apply to."""

    loss: Tensor  # [B, T] L_t, with gradient
    log_ratio: Tensor  # [B, T] log(π_θ / π_ref)
    advantage: Tensor  # [B, T] Â
    multiplier: Tensor  # [B, T] m

    def __add__(self, other: Surrogate) -> Surrogate:
        """The union of two surrogates on disjoint sequences."""
        return Surrogate(
            self.loss + other.loss,
            self.log_ratio + other.log_ratio,
            self.advantage + other.advantage,
            self.multiplier + other.multiplier,
        )


def surrogate(parts: Parts, own: Tensor, batch: TokenBatch, options: Options) -> Surrogate:
    """L_t = -sg[m_t Â_t] f(exp(log π_θ,t - sg(log π_ref,t))) on the sequences `own` [B] bool.

    Its autograd gradient is grad_Uni = m (1 / π_ref) Â ∇π_θ (arXiv 2509.04419), through f where a row
    shapes the likelihood.
    """
    mask = batch.mask & own[:, None]
    log_ratio = torch.where(mask, REFERENCES[parts.reference](batch), 0.0)
    advantage = torch.where(mask, advantage_of(parts.advantage, batch, own, options), 0.0)
    multiplier = mask.to(log_ratio.dtype)
    for name in parts.stabilizer.split("+"):
        multiplier = multiplier * STABILIZERS[name](log_ratio, advantage, batch, options)
    ratio = torch.exp(log_ratio + (batch.logp - batch.logp.detach()))
    loss = -(multiplier * advantage).detach() * LIKELIHOODS[parts.likelihood](ratio, options)
    return Surrogate(loss, log_ratio, advantage, multiplier)
