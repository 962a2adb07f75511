"""HPT's gates: the paper's switch, the authors' zones, and the laws all of them keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpt_mega.scheduler import GATES, gate

EIGHTHS = torch.arange(9, dtype=torch.float64) / 8


@pytest.mark.parametrize(("threshold", "first_rl"), [(0.0, 1), (2 / 8, 3), (1.0, 9), (-1.0, 0)])
def test_switch_sends_a_question_to_rl_above_the_threshold(threshold: float, first_rl: int) -> None:
    alpha, beta = gate("switch", threshold=threshold)(EIGHTHS)
    assert alpha.tolist() == [float(solved >= first_rl) for solved in range(9)]
    assert (alpha + beta == 1).all()


def test_three_zone_has_sft_then_both_then_rl() -> None:
    alpha, beta = gate("three_zone", switch_gate=1 / 8, switch_gate_off=3 / 8)(EIGHTHS)
    assert alpha.tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1]
    assert beta.tolist() == [1, 1, 1, 1, 0, 0, 0, 0, 0]


def test_three_zone_without_a_middle_is_the_switch() -> None:
    zones = gate("three_zone", switch_gate=0.25, switch_gate_off=0.25)(EIGHTHS)
    switch = gate("switch", threshold=0.25)(EIGHTHS)
    assert all(torch.equal(a, b) for a, b in zip(zones, switch, strict=True))


def test_soft_keeps_every_rollout_and_adds_the_demonstration() -> None:
    alpha, beta = gate("soft", threshold=0.125)(EIGHTHS)
    assert alpha.tolist() == [1] * 9
    assert beta.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0]


def test_linear_and_sigmoid_follow_their_formulas() -> None:
    alpha, beta = gate("linear")(EIGHTHS)
    assert torch.equal(alpha, EIGHTHS) and torch.equal(beta, 1 - EIGHTHS)
    alpha, beta = gate("sigmoid", center=0.25, temperature=0.2)(EIGHTHS)
    for rate, a, b in zip(EIGHTHS.tolist(), alpha.tolist(), beta.tolist(), strict=True):
        assert a == pytest.approx(1 / (1 + math.exp(-(rate - 0.25) / 0.2)))
        assert a + b == pytest.approx(1)


def test_inverse_mse_is_even_at_its_balance_and_keeps_the_paper_s_gate_at_both_ends() -> None:
    alpha, beta = gate("inverse_mse", balance=0.25)(torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64))
    assert beta.tolist() == pytest.approx([1, 1 / 2, 1 / 5, 1 / 17])
    assert (alpha + beta).tolist() == pytest.approx([1.0] * 4)


@pytest.mark.parametrize("name", GATES)
@given(rates=st.lists(st.floats(0, 1), max_size=9).map(sorted))
def test_weights_lie_in_the_unit_interval_and_move_from_sft_to_rl(name: str, rates: list[float]) -> None:
    alpha, beta = gate(name)(torch.tensor(rates, dtype=torch.float64))
    assert alpha.shape == beta.shape == (len(rates),)
    for weight in (alpha, beta):
        assert ((weight >= 0) & (weight <= 1)).all()
    assert (alpha.diff() >= 0).all() and (beta.diff() <= 0).all()
    assert ((alpha > 0) | (beta > 0)).all()


@pytest.mark.parametrize("rate", [-0.1, 1.01, float("nan")])
def test_a_pass_rate_outside_the_unit_interval_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"pass rates must lie in \[0, 1\]"):
        gate("switch")(torch.tensor([0.5, rate]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("swich", {}, "unknown gate 'swich'; known: switch, three_zone"),
        ("switch", {"treshold": 0.1}, "unknown option 'treshold' of gate 'switch'; known: threshold"),
        ("linear", {"threshold": 0.1}, "known: none"),
        ("switch", {"threshold": "low"}, "must be a finite number"),
        ("soft", {"threshold": 1.5}, "is a pass rate, expected 1 or below; got 1.5"),
        ("sigmoid", {"temperature": 0.0}, "temperature above 0"),
        ("inverse_mse", {"balance": 0.0}, "balance above 0"),
        ("three_zone", {"switch_gate": 0.5, "switch_gate_off": 0.2}, "switch_gate <= switch_gate_off"),
    ],
)
def test_misuse_says_what_is_known(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate(name, **options)
