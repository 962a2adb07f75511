"""Intervals and paired tests over runs, against Student's published table and his density integrated."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hpt_mega.telemetry.significance import holm, mean, quantile, within

# Two-sided 95 % points, as printed in any table of Student's distribution.
TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 9: 2.262, 19: 2.093, 30: 2.042, 60: 2.000}


def integrated(t: float, freedom: int) -> float:
    """P(|T| < t) by Simpson's rule on the density."""
    x = np.linspace(0.0, t, 20_001)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    density = scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    weights = np.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    return float(2 * (weights * density).sum() * (x[1] - x[0]) / 3)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 7, 8, 19, 40])
def test_probabilities_are_the_density_integrated(freedom: int) -> None:
    for t in (0.0, 0.3, 1.0, 2.5, 9.0):
        assert within(t, freedom) == pytest.approx(integrated(t, freedom), abs=1e-9)


def test_quantiles_are_those_of_the_table() -> None:
    for freedom, expected in TABLE.items():
        assert quantile(0.95, freedom) == pytest.approx(expected, abs=5e-4)


def test_the_interval_of_a_mean_is_student_s() -> None:
    found = mean([[3.0, 5.0, 7.0, 9.0, 11.0]])  # standard deviation sqrt(10)
    assert found.value == 7.0
    assert found.half_width == pytest.approx(2.776 * math.sqrt(10 / 5), rel=1e-3)
    assert math.isnan(mean([[4.0]]).half_width)
    with pytest.raises(ValueError, match="at least one value"):
        mean([])


def test_the_levels_of_models_widen_neither_an_interval_over_seeds_nor_its_test() -> None:
    found = mean([[1.0, 3.0], [101.0, 103.0, 105.0]])
    assert found.value == pytest.approx(62.6)
    error = math.sqrt((1 + 1 + 4 + 0 + 4) / 3 / 5)
    assert found.half_width == pytest.approx(3.182 * error, rel=1e-3)
    assert found.p == pytest.approx(1 - integrated(62.6 / error, 3), abs=1e-8)


def test_a_test_of_paired_differences_is_student_s() -> None:
    # Student 1908, hours of additional sleep by two drugs on ten patients: t = 4.06, p = 0.0028
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    differences = [b - a for a, b in zip(first, second, strict=True)]
    found = mean([differences])
    assert found.value == pytest.approx(1.58)
    assert found.p == pytest.approx(0.00283, abs=1e-5)
    assert mean([[-d for d in differences]]).p == pytest.approx(found.p)


def test_values_without_spread_and_a_single_run_a_model_have_no_doubtful_p() -> None:
    assert mean([[0.0, 0.0]]).p == 1.0
    assert mean([[1.0, 1.0]]).p == 0.0
    assert math.isnan(mean([[1.0], [2.0]]).p)


def test_the_p_values_of_a_family_are_raised_in_their_order() -> None:
    """Checked by hand: 4 x 0.01, 3 x 0.011 (not below the one before it), 2 x 0.3, 0.6 (likewise)."""
    assert holm([0.3, 0.01, 0.6, 0.011]) == pytest.approx([0.6, 0.04, 0.6, 0.04])
    assert holm([0.7, 0.8]) == [1.0, 1.0]
    raised = holm([0.02, math.nan])
    assert raised[0] == 0.02 and math.isnan(raised[1])
