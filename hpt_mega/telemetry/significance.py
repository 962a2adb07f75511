"""Means over runs with Student's intervals and tests; of paired differences, they compare two methods.

Intervals over questions, of one evaluation, are evaluation/statistics.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over runs, half the width of its interval, and the p-value of its being 0 (two-sided t-test).

    half_width and p are nan where each model has one run; p is 1 or 0 where all its runs are alike.
    """

    value: float
    half_width: float
    p: float


def mean(cells: Sequence[Sequence[float]]) -> Mean:
    """Over the runs of several models, each a cell, with the error that seeds give: models' own levels are no
    error of a method, so deviations are from each model's mean. Of these models, that is, not of any model.

    Raises ValueError where there are no values.
    """
    values = [value for cell in cells for value in cell]
    if not values:
        raise ValueError("expected at least one value")
    value, freedom = fmean(values), len(values) - len(cells)
    if freedom == 0:
        return Mean(value, math.nan, math.nan)
    squares = sum((value - fmean(cell)) ** 2 for cell in cells for value in cell)
    error = math.sqrt(squares / freedom / len(values))
    if error == 0:
        return Mean(value, 0.0, 1.0 if value == 0 else 0.0)
    return Mean(value, quantile(LEVEL, freedom) * error, 1 - within(abs(value) / error, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values of a family of tests, each raised so that one wrong finding among all is as rare as it
    says (Holm 1979). nan, of a test that was not made, stays and does not count."""
    order = sorted((i for i, p in enumerate(p_values) if p == p), key=lambda i: p_values[i])
    adjusted, highest = list(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, p_values[i] * (len(order) - rank)))
        adjusted[i] = highest
    return adjusted


def within(t: float, freedom: int) -> float:
    """The probability that |T| < t under Student's distribution; Abramowitz and Stegun 26.7.3 and 26.7.4."""
    if freedom < 1 or t < 0:
        raise ValueError(f"expected t >= 0 and at least 1 degree of freedom; got {t} and {freedom}")
    angle = math.atan2(t, math.sqrt(freedom))
    cosine = math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def quantile(level: float, freedom: int) -> float:
    """The t that |T| stays below with probability `level`."""
    low, high = 0.0, 1.0
    while within(high, freedom) < level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < level else (low, middle)
    return high
