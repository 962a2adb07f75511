"""One step of every row as one micro-batch and as several uneven ones, and the authors' way beside it."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from hpt_mega.objective import Estimator, TokenBatch, algorithm, rows

PAIRS, T, PARAMETERS = 14, 9, 31
GROUP_SIZES = (9, 7, 1, 5, 4, 2)
SPLITS = (2, 3, 7)
Fields = dict[str, Tensor]


def step(name: str, seed: int, dtype: torch.dtype = torch.float32) -> Fields:
    """Every field of a step of 28 sequences: pairs (i, i + 14), uneven groups and lengths, some clipped."""
    generator = torch.Generator().manual_seed(seed)
    size = (2 * PAIRS, T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    (row,) = (row for row in rows() if row.name == name)
    logp = -normal(*size).abs()
    lengths = torch.randint(1, T + 1, (2 * PAIRS, 1), generator=generator)
    offline = torch.rand(2 * PAIRS, generator=generator) < 0.25
    return {
        "logp": logp,
        "mask": torch.arange(T) < lengths,
        "old_logp": logp + 0.3 * normal(*size),
        "ref_logp": logp + 0.3 * normal(*size),
        "values": normal(*size),
        "entropy": normal(*size).abs(),
        "reward": torch.rand(2 * PAIRS, dtype=dtype, generator=generator),
        "group": torch.repeat_interleave(torch.arange(len(GROUP_SIZES)), torch.tensor(GROUP_SIZES)),
        "source": (offline & (row.offline is not None or row.any_source)).long(),
        "pair": torch.arange(2 * PAIRS) % PAIRS,
        "weight": 0.5 + torch.rand(2 * PAIRS, dtype=dtype, generator=generator),
    }


def uneven(parts: int, seed: int, pairs: bool) -> list[Tensor]:
    """Indices of the sequences in `parts` micro-batches of sizes about 1 : 2 : 3 ...; pairs together."""
    units = PAIRS if pairs else 2 * PAIRS
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed))
    total, cuts = parts * (parts + 1) // 2, [0]
    for i in range(1, parts + 1):
        cuts.append(max(cuts[-1] + 1, units * i * (i + 1) // 2 // total))
    pieces = [order[a:b] for a, b in pairwise(cuts)]
    return [torch.cat([piece, piece + PAIRS]) if pairs else piece for piece in pieces]


def moved_by_split(name: str, parts: int, seed: int) -> tuple[float, float]:
    """(|change of the loss|, max |change of a parameter's gradient|) from 1 micro-batch to more, in fp32."""
    options = {"kl_coef": 0.05, "entropy_coef": 0.01}
    estimator = algorithm(name, **options)
    if estimator.row.aggregation == "constant":
        estimator = algorithm(name, **options, length=T)
    fields = step(name, seed)
    if estimator.advantage_per_sequence:  # taken before the split, as the trainer does
        advantage = estimator.advantages(fields["reward"], fields["group"], fields["source"])
        fields["advantage"] = advantage[:, None].expand(-1, T)
    whole_loss, whole, _ = _accumulate(estimator, fields, [torch.arange(2 * PAIRS)])
    loss, gradient, _ = _accumulate(estimator, fields, uneven(parts, seed, pairs=name == "dpo"))
    return abs(loss - whole_loss), float((gradient - whole).abs().max())


def _accumulate(estimator: Estimator, fields: Fields, pieces: list[Tensor]) -> tuple[float, Tensor, Tensor]:
    """The summed loss of the micro-batches, and its gradient for shared parameters and for every logp."""
    logp = fields["logp"].clone().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    slope = torch.randn(*logp.shape, PARAMETERS, generator=generator)  # d logp / d parameters
    shared = torch.zeros(PARAMETERS, requires_grad=True)
    parts = [{key: value[piece] for key, value in fields.items()} for piece in pieces]
    denominator = sum(estimator.denominator(TokenBatch(**part)) for part in parts)
    loss = 0.0
    for piece, part in zip(pieces, parts, strict=True):
        used = logp[piece] + slope[piece] @ shared
        out = estimator(TokenBatch(**(part | {"logp": used})), denominator=denominator)
        out.loss.backward()
        loss += out.loss.item()
    assert logp.grad is not None and shared.grad is not None
    return loss, shared.grad, logp.grad


def authors_gradient(fields: Fields, pieces: list[Tensor], averaged: bool) -> tuple[Tensor, Tensor]:
    """(RL, SFT) gradients [B, T] of HPT as the authors' code normalises it, summed over micro-batches.

    In each micro-batch the SFT loss is the mean over its demonstrations' tokens and the RL loss a sum over
    tokens over the padded length; averaged divides by the number of micro-batches (gradient accumulation).
    """
    estimator = algorithm("hpt")
    reward, group, source = fields["reward"], fields["group"], fields["source"]
    advantage = estimator.advantages(reward, group, source)[:, None]
    logp = fields["logp"].clone().requires_grad_()
    rl, sft = logp.sum() * 0, logp.sum() * 0
    for piece in pieces:
        mask, offline = fields["mask"][piece], (source[piece] == 1)[:, None]
        ratio = torch.exp(logp[piece] - fields["old_logp"][piece])
        rl = rl - (ratio * advantage[piece])[mask & ~offline].sum() / T
        if bool((mask & offline).any()):
            sft = sft - logp[piece][mask & offline].mean()
    share = len(pieces) if averaged else 1
    (rl_grad,) = torch.autograd.grad(rl / share, logp)
    (sft_grad,) = torch.autograd.grad(sft / share, logp)
    return rl_grad, sft_grad


def hpt_gradient(fields: Fields, pieces: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(RL, SFT) gradients [B, T] of our row hpt on the same micro-batches."""
    estimator = algorithm("hpt", length=T)
    advantage = estimator.advantages(fields["reward"], fields["group"], fields["source"])
    given = fields | {"advantage": advantage[:, None].expand(-1, T), "weight": torch.ones(2 * PAIRS)}
    _, _, gradient = _accumulate(estimator, given, pieces)
    offline = (fields["source"] == 1)[:, None]
    return torch.where(offline, 0.0, gradient), torch.where(offline, gradient, 0.0)
