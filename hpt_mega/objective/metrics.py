"""What a researcher wants to see of an estimator: sums that add up over calls, and the means made of them.

Nothing here takes part in the gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from hpt_mega.objective.batch import TokenBatch
from hpt_mega.objective.reference import LOG_RATIO_LIMIT
from hpt_mega.objective.surrogate import Surrogate


@torch.no_grad()
def sums(batch: TokenBatch, parts: Surrogate, token_weight: Tensor) -> dict[str, float]:
    """Sums and maxima over the tokens of one call, "sum/NAME" and "max/NAME"."""
    mask = batch.mask
    if not bool(mask.any()):
        return {"sum/tokens": 0.0, "sum/sequences": float(len(batch))}
    ratio, advantage = parts.log_ratio[mask].double().exp(), parts.advantage[mask].double()
    offline = (batch.offline[:, None] & mask)[mask]
    pull = token_weight[mask].abs().double()
    found = {
        "sum/nll": -batch.logp[mask].sum(),
        "sum/masked": (parts.multiplier[mask] == 0).sum(),
        "sum/ratio": ratio.sum(),
        "sum/ratio_squared": ratio.square().sum(),
        "max/ratio": ratio.max(),
        "sum/advantage": advantage.sum(),
        "sum/advantage_squared": advantage.square().sum(),
        "sum/offline_tokens": offline.sum(),
        "sum/pull": pull.sum(),
        "sum/offline_pull": pull[offline].sum(),
    }
    if batch.entropy is not None:
        found["sum/entropy"] = batch.entropy[mask].sum()
    if batch.rollout_logp is not None and batch.old_logp is not None:
        online = mask & ~batch.offline[:, None]
        found["sum/engine_gap"] = (batch.old_logp - batch.rollout_logp)[online].abs().sum()
    if batch.ref_logp is not None:
        delta = (batch.ref_logp - batch.logp)[mask].double().clamp(max=LOG_RATIO_LIMIT)
        found["sum/kl"] = (delta.exp() - delta - 1).sum()
    values = torch.stack([value.double() for value in found.values()]).tolist()
    counts = {"sum/tokens": float(mask.sum()), "sum/sequences": float(len(batch))}
    return counts | dict(zip(found, values, strict=True))


def added(calls: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sums and maxima of several calls together."""
    found: dict[str, float] = {}
    for call in calls:
        for name, value in call.items():
            merge = max if name.startswith("max/") else operator.add
            found[name] = merge(found[name], value) if name in found else value
    return found


def means(sums: Mapping[str, float]) -> dict[str, float]:
    """Metrics by name; of no token, tokens and sequences alone.

    tokens, sequences: counts. nll: -log π_θ. masked_fraction: tokens whose stabilizer is 0.
    ratio_mean, ratio_max: of π_θ / π_ref. effective_sample_size: (Σ r)² / (n Σ r²), 1 when all ratios agree.
    offline_token_fraction, offline_gradient_share: demonstrations' part of the tokens and of
    Σ |d loss / d logp|. entropy, engine_gap = |log π_old - log π_engine| and kl (k3, to the reference model)
    only where their fields are given.
    """
    tokens = sums.get("sum/tokens", 0.0)
    found = {"tokens": tokens, "sequences": sums.get("sum/sequences", 0.0)}
    if not tokens:
        return found
    mean = {name.removeprefix("sum/"): value / tokens for name, value in sums.items() if name[:4] == "sum/"}
    variance = mean["advantage_squared"] - mean["advantage"] ** 2
    found |= {
        "nll": mean["nll"],
        "masked_fraction": mean["masked"],
        "ratio_mean": mean["ratio"],
        "ratio_max": sums["max/ratio"],
        "effective_sample_size": mean["ratio"] ** 2 / mean["ratio_squared"],
        "advantage_mean": mean["advantage"],
        "advantage_std": max(0.0, variance) ** 0.5,
        "offline_token_fraction": mean["offline_tokens"],
        "offline_gradient_share": mean["offline_pull"] / mean["pull"] if mean["pull"] else 0.0,
    }
    online = tokens - sums["sum/offline_tokens"]
    if "engine_gap" in mean:
        found["engine_gap"] = sums["sum/engine_gap"] / online if online else 0.0
    return found | {name: mean[name] for name in ("entropy", "kl") if name in mean}
