"""Losses and gradients in fp32 over uneven micro-batches, for every row; and that the authors' ones move."""

from __future__ import annotations

import pytest
import torch

from hpt_mega.objective import rows
from tests.objective.splits import (
    PAIRS,
    SPLITS,
    authors_gradient,
    hpt_gradient,
    moved_by_split,
    step,
    uneven,
)

torch.set_num_threads(1)


@pytest.mark.parametrize("name", [row.name for row in rows()])
@pytest.mark.parametrize("parts", SPLITS)
def test_one_microbatch_and_several_uneven_ones_agree_in_fp32(name: str, parts: int) -> None:
    for seed in range(3):
        assert max(moved_by_split(name, parts, seed)) <= 1e-6


@pytest.mark.parametrize("parts", SPLITS)
@pytest.mark.parametrize("pairs", [False, True])
def test_the_microbatches_hold_every_sequence_once_and_differ_in_size(parts: int, pairs: bool) -> None:
    pieces = uneven(parts, 0, pairs)
    assert torch.cat(pieces).sort().values.tolist() == list(range(2 * PAIRS))
    assert len(pieces) == parts and len({len(piece) for piece in pieces}) > 1


@pytest.mark.parametrize("averaged", [False, True])
def test_the_balance_of_sft_and_rl_moves_with_the_split_in_the_authors_code_and_not_here(
    averaged: bool,
) -> None:
    fields, whole = step("hpt", 0), [torch.arange(2 * PAIRS)]
    pieces = uneven(7, 0, pairs=False)

    def balance(rl: torch.Tensor, sft: torch.Tensor) -> float:
        return float(sft.norm() / rl.norm())

    before, after = (balance(*authors_gradient(fields, split, averaged)) for split in (whole, pieces))
    assert after > 2 * before
    assert balance(*hpt_gradient(fields, pieces)) == pytest.approx(
        balance(*hpt_gradient(fields, whole)), rel=1e-5
    )
