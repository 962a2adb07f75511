"""What a researcher wants to see of one call of an estimator; plain floats, means over the masked tokens.

To combine micro-batches weigh means by `tokens`; nothing here takes part in the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpt_mega.objective.batch import TokenBatch
from hpt_mega.objective.reference import LOG_RATIO_LIMIT
from hpt_mega.objective.surrogate import Surrogate


@torch.no_grad()
def diagnose(batch: TokenBatch, parts: Surrogate, token_weight: Tensor) -> dict[str, float]:
    """Metrics by name.

    tokens, sequences: counts. nll: -log π_θ. masked_fraction: tokens whose stabilizer is 0.
    ratio_mean, ratio_max, ratio_p05 (50, 95, 99): mean, maximum and quantiles of π_θ / π_ref.
    effective_sample_size: (Σ r)² / (n Σ r²), 1 when all ratios agree.
    offline_token_fraction, offline_gradient_share: demonstrations' part of the tokens and of
    Σ |d loss / d logp|. entropy, engine_gap = |log π_old - log π_engine| and kl (k3, to the reference model)
    only where their fields are given.
    """
    mask = batch.mask
    if not bool(mask.any()):
        return {"tokens": 0.0, "sequences": float(len(batch))}
    log_ratio, advantage = parts.log_ratio[mask].double(), parts.advantage[mask].double()
    count = log_ratio.numel()
    offline = (batch.offline[:, None] & mask)[mask]
    pull = token_weight[mask].abs().double()
    spread = 2 * log_ratio.logsumexp(0) - (2 * log_ratio).logsumexp(0)
    found = {
        "nll": -batch.logp[mask].mean(),
        "masked_fraction": (parts.multiplier[mask] == 0).double().mean(),
        "ratio_mean": log_ratio.exp().mean(),
        "ratio_max": log_ratio.exp().max(),
        **_quantiles(log_ratio),
        "effective_sample_size": spread.exp() / count,
        "advantage_mean": advantage.mean(),
        "advantage_std": advantage.std(correction=0),
        "offline_token_fraction": offline.double().mean(),
        "offline_gradient_share": pull[offline].sum() / pull.sum().clamp(min=torch.finfo(pull.dtype).tiny),
    }
    if batch.entropy is not None:
        found["entropy"] = batch.entropy[mask].mean()
    if batch.rollout_logp is not None and batch.old_logp is not None:
        online = mask & ~batch.offline[:, None]
        gap = (batch.old_logp - batch.rollout_logp)[online].abs()
        found["engine_gap"] = gap.mean() if gap.numel() else gap.sum()
    if batch.ref_logp is not None:
        delta = (batch.ref_logp - batch.logp)[mask].double().clamp(max=LOG_RATIO_LIMIT)
        found["kl"] = (delta.exp() - delta - 1).mean()
    values = torch.stack([value.double() for value in found.values()]).tolist()
    return {"tokens": float(count), "sequences": float(len(batch)), **dict(zip(found, values, strict=True))}


def _quantiles(log_ratio: Tensor) -> dict[str, Tensor]:
    """Quantiles of the ratio, each that of a token (torch.quantile refuses 2^24 tokens and more)."""
    ordered = log_ratio.sort().values
    last = len(ordered) - 1
    return {f"ratio_p{percent:02d}": ordered[last * percent // 100].exp() for percent in (5, 50, 95, 99)}
