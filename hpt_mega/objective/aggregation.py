"""How token losses become one number: a scale for each token and a denominator for the whole step.

loss = sum(scale * L) / denominator. Scales and denominators are sums over sequences, so micro-batches and
data-parallel ranks add theirs up and the loss does not depend on the split.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpt_mega.objective.batch import TokenBatch
from hpt_mega.objective.options import Options

# (batch, options) -> (scale [B, 1], denominator as a 0-d tensor)
Aggregation = Callable[[TokenBatch, Options], tuple[Tensor, Tensor]]


def token_mean(batch: TokenBatch, options: Options) -> tuple[Tensor, Tensor]:
    """Mean over all masked tokens (DAPO, arXiv 2503.14476)."""
    return _ones(batch), batch.mask.sum()


def sequence_mean(batch: TokenBatch, options: Options) -> tuple[Tensor, Tensor]:
    """Mean over sequences of the mean over tokens (GRPO, arXiv 2402.03300); empty sequences do not count."""
    lengths = batch.lengths
    return 1 / lengths.clamp(min=1)[:, None], (lengths > 0).sum()


def constant(batch: TokenBatch, options: Options) -> tuple[Tensor, Tensor]:
    """Sum over tokens / `length`, mean over sequences (Dr.GRPO, arXiv 2503.20783)."""
    length = batch.mask.shape[1] if options.length is None else options.length
    return _ones(batch), torch.tensor(float(len(batch) * length), dtype=torch.float64)


def question_mean(batch: TokenBatch, options: Options) -> tuple[Tensor, Tensor]:
    """Mean over questions of the mean over the question's tokens.

    A question split over micro-batches needs TokenBatch.question_tokens, its tokens in the whole step.
    """
    lengths, tokens = batch.lengths, batch.question_tokens
    if tokens is None:
        group = batch.require("group", "aggregation 'question_mean'")
        same = group[:, None] == group[None, :]
        tokens = (same * lengths).sum(1)
    tokens = tokens.to(lengths.dtype).clamp(min=1)
    return 1 / tokens[:, None], (lengths.double() / tokens.double()).sum()


def pair_mean(batch: TokenBatch, options: Options) -> tuple[Tensor, Tensor]:
    """Sum over the tokens of a pair, mean over pairs (DPO, arXiv 2305.18290)."""
    return _ones(batch), torch.tensor(len(batch) / 2, dtype=torch.float64)


def _ones(batch: TokenBatch) -> Tensor:
    return batch.logp.new_ones((len(batch), 1)).detach()


AGGREGATIONS: dict[str, Aggregation] = {
    "token_mean": token_mean,
    "sequence_mean": sequence_mean,
    "constant": constant,
    "question_mean": question_mean,
    "pair_mean": pair_mean,
}
