"""Means over runs with Student's intervals, and paired tests of two methods on the same seeds.

Intervals over questions, of one evaluation, are evaluation/statistics.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

LEVEL = 0.95


@dataclass(frozen=True)
class Mean:
    """A mean over runs and half the width of its interval: nan where one run has none."""

    value: float
    half_width: float
    count: int


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences, its interval, and the p-value of its being 0 (two-sided t-test)."""

    difference: Mean
    p: float


def mean(values: Sequence[float]) -> Mean:
    """The mean with its Student interval at LEVEL. Raises ValueError where there are no values."""
    if not values:
        raise ValueError("expected at least one value")
    count = len(values)
    if count == 1:
        return Mean(values[0], math.nan, 1)
    return Mean(fmean(values), quantile(LEVEL, count - 1) * stdev(values) / math.sqrt(count), count)


def blocked(cells: Sequence[Sequence[float]]) -> Mean:
    """The mean over the runs of several models, with the interval that seeds give: models' own levels are no
    error of a method, so deviations are from each model's mean. half_width is nan for one run a model."""
    values = [value for cell in cells for value in cell]
    if not values:
        raise ValueError("expected at least one value")
    freedom = len(values) - len(cells)
    if freedom == 0:
        return Mean(fmean(values), math.nan, len(values))
    squares = sum((value - fmean(cell)) ** 2 for cell in cells for value in cell)
    error = math.sqrt(squares / freedom / len(values))
    return Mean(fmean(values), quantile(LEVEL, freedom) * error, len(values))


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Paired:
    """The test of ours - theirs, run by run. p is nan for one pair, 1 or 0 where all pairs differ alike."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    found = mean(differences)
    if found.count == 1:
        return Paired(found, math.nan)
    error = stdev(differences) / math.sqrt(found.count)
    if error == 0:
        return Paired(found, 1.0 if found.value == 0 else 0.0)
    return Paired(found, 1 - within(abs(found.value) / error, found.count - 1))


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
