"""Choosing the next token from logits. Pure tensor arithmetic, no model and no engine."""

from __future__ import annotations

import torch
from torch import Tensor

_LIKELY = 1024  # tokens that hold nearly every nucleus; finding them costs a fraction of a sort
_WHOLE = 2**52  # the integer that stands for probability 1
_AT_ONCE = 2**20  # logits; of more, a CPU would write each intermediate to fresh pages outside its cache


def uniform_draws(count: int, max_new_tokens: int, seed: int) -> Tensor:
    """[count, max_new_tokens] uniforms in [0, 1): row i drives sequence i, however it is batched."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, max_new_tokens, generator=generator, dtype=torch.float64)


def sample_tokens(
    logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Next tokens [B] and their log-probabilities [B] fp32, by inverting the cumulative distribution.

    temperature 0 takes the most likely token. top_p keeps the smallest set of tokens whose probability
    reaches it; the reported log-probability is the one before that truncation.
    """
    rows = max(1, _AT_ONCE // logits_BV.shape[1]) if logits_BV.is_cpu else len(logits_BV)
    parts = zip(logits_BV.split(rows), uniforms_B.split(rows), strict=True)
    tokens, logp = zip(*(_sample(*part, temperature, top_p) for part in parts), strict=True)
    return torch.cat(tokens), torch.cat(logp)


def _sample(logits_BV: Tensor, uniforms_B: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    logits_BV = logits_BV.float()
    if temperature not in (0.0, 1.0):
        logits_BV = logits_BV / temperature
    logp_BV = torch.log_softmax(logits_BV, dim=-1)
    if temperature == 0:
        tokens_B = logp_BV.argmax(dim=-1)
    elif top_p < 1:
        tokens_B = _nucleus(logp_BV.exp(), uniforms_B, top_p)
    else:
        tokens_B = _invert(_shares(logp_BV.exp()), uniforms_B)
    return tokens_B, logp_BV.gather(1, tokens_B[:, None])[:, 0]


def _shares(probability_BV: Tensor) -> Tensor:
    """Probabilities as integers, whose sums are the same in any order and on any device.

    On a GPU a running sum of floating-point numbers is not, and torch refuses it in deterministic mode.
    """
    return (probability_BV * _WHOLE).long()


def _invert(shares_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The tokens whose shares of the sum the draws fall into; the shares are overwritten."""
    cumulative_BV = shares_BV.cumsum_(dim=-1)
    total_B1 = cumulative_BV[:, -1:]
    below_B1 = total_B1 - 1  # a draw next to 1 must not round to it
    threshold_B1 = torch.minimum((uniforms_B[:, None] * total_B1).long(), below_B1)
    tokens_B1 = torch.searchsorted(cumulative_BV, threshold_B1, right=True)
    return tokens_B1[:, 0].clamp_(max=shares_BV.shape[1] - 1)


def _nucleus(probability_BV: Tensor, uniforms_B: Tensor, top_p: float) -> Tensor:
    """Draws from the smallest set; all tokens are sorted only where a row's set is larger than _LIKELY."""
    sorted_BK, order_BK = probability_BV.topk(min(_LIKELY, probability_BV.shape[1]))
    if bool((sorted_BK.sum(dim=-1) < top_p).any()):
        sorted_BK, order_BK = probability_BV.sort(dim=-1, descending=True)
    shares_BK = _shares(sorted_BK)
    before_BK = shares_BK.cumsum(dim=-1).sub_(shares_BK)
    rank_B = _invert(shares_BK.masked_fill_(before_BK >= int(top_p * _WHOLE), 0), uniforms_B)
    return order_BK.gather(1, rank_B[:, None])[:, 0]
