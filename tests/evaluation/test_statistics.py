"""avg@k and pass@k against subsets counted one by one, and the coverage of their intervals in simulation."""

from __future__ import annotations

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpt_mega.evaluation.statistics import (
    average,
    avg_at_k,
    bootstrap,
    mean_pass_at_k,
    pass_at_k,
)


@pytest.mark.parametrize(("n", "c", "k"), [(7, 3, 2), (7, 0, 3), (7, 7, 1), (9, 1, 9), (10, 4, 5), (5, 4, 2)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n: int, c: int, k: int) -> None:
    samples = [1] * c + [0] * (n - c)
    subsets = list(combinations(samples, k))
    share = sum(any(subset) for subset in subsets) / len(subsets)
    assert pass_at_k([n], [c], k)[0] == pytest.approx(share, abs=1e-15)


@given(st.integers(1, 200), st.data())
def test_pass_at_k_is_the_closed_form_in_exact_integers(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    expected = 1 - comb(n - c, k) / comb(n, k)
    assert pass_at_k(n, [c], k)[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_1_is_the_average_and_ten_thousand_samples_do_not_overflow() -> None:
    n, c = [4, 9, 10_000], [1, 6, 37]
    np.testing.assert_allclose(pass_at_k(n, c, 1), average(n, c), rtol=1e-14)
    many = pass_at_k([10_000], [37], 500)[0]
    assert many == pytest.approx(1 - comb(9_963, 500) / comb(10_000, 500), rel=1e-9)


def test_pass_at_k_is_unbiased_where_1_minus_power_is_not() -> None:
    random, p, n, k = np.random.default_rng(5), 0.2, 10, 5
    correct = random.binomial(n, p, 40_000)
    truth = 1 - (1 - p) ** k
    error = np.std(pass_at_k(n, correct, k)) / np.sqrt(correct.size)
    assert abs(pass_at_k(n, correct, k).mean() - truth) < 4 * error
    assert abs((1 - (1 - correct / n) ** k).mean() - truth) > 20 * error


@pytest.mark.parametrize("questions", [40, 135])
@pytest.mark.parametrize("k", [1, 4])
def test_a_95_percent_interval_holds_the_truth_in_95_percent_of_simulations(questions: int, k: int) -> None:
    random, runs, n = np.random.default_rng(questions + k), 2_000, 8
    rates = random.beta(0.7, 0.9, 400_000)  # questions hard, easy and between
    truth = float(np.mean(1 - (1 - rates) ** k))
    held = 0
    for run in range(runs):
        correct = random.binomial(n, random.choice(rates, questions))
        found = bootstrap(pass_at_k(n, correct, k), seed=run, resamples=400)
        held += found.low <= truth <= found.high
    assert held / runs == pytest.approx(0.95, abs=0.02)  # 4 standard errors of the simulation


def test_the_interval_is_that_of_the_normal_law_where_questions_are_many() -> None:
    scores = np.random.default_rng(1).random(3_001)
    found = bootstrap(scores, seed=2, resamples=4_000)
    half = 1.96 * scores.std(ddof=1) / np.sqrt(scores.size)
    assert found.value == pytest.approx(scores.mean())
    assert found.high - found.value == pytest.approx(half, rel=0.06)
    assert found.value - found.low == pytest.approx(half, rel=0.06)


def test_a_seed_fixes_the_interval_and_certain_answers_leave_no_width() -> None:
    n, c = 32, [3, 30, 0, 17, 32, 8, 21]
    assert avg_at_k(n, c, seed=4) == avg_at_k(n, c, seed=4)
    assert avg_at_k(n, c, seed=4) != avg_at_k(n, c, seed=5)
    sure = mean_pass_at_k(n, [32] * 9, 8)
    assert (sure.low, sure.value, sure.high, sure.questions) == (1.0, 1.0, 1.0, 9)
    assert str(sure) == "100.0 [100.0, 100.0]"


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [
        (4, [1, 5], 1, "0 <= correct <= samples"),
        (4, [1.5], 1, "whole numbers"),
        ([4, 9], [1, 2], 5, "expected 1 to 4"),
        (4, [1], 0, "k is 0"),
        (4, [[1]], 1, "one count a question"),
    ],
)
def test_impossible_counts_are_refused(n: object, c: object, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)  # type: ignore[arg-type]


def test_no_scores_and_impossible_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one score"):
        bootstrap([])
    with pytest.raises(ValueError, match=r"level is 1\.5"):
        bootstrap([0.5], level=1.5)
