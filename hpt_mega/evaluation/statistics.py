"""avg@k and unbiased pass@k of an evaluation, with bootstrap confidence intervals over questions.

Only counts come in here, c right of n samples for each question; who generated and graded them is elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

RESAMPLES = 2_000
BLOCK = 2_000_000  # drawn indices at a time: 16 MB, whatever the number of questions


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its confidence interval."""

    value: float
    low: float
    high: float
    level: float
    questions: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def pass_at_k(samples: ArrayLike, correct: ArrayLike, k: int) -> Floats:
    """Unbiased pass@k of each question: 1 - C(n - c, k) / C(n, k), Chen et al. 2021, equation 1.

    samples [Q] n and correct [Q] c, integers with 0 <= c <= n and n >= k; samples may be one number for all.
    The quotient is a product of k factors (n - c - i) / (n - i): no binomial is formed, nothing overflows.
    Raises ValueError.
    """
    n, c = _counts(samples, correct)
    if k < 1 or (n.size and k > n.min()):
        raise ValueError(
            f"k is {k}; expected 1 to {n.min() if n.size else 0}, the fewest samples of a question"
        )
    missed = np.ones(n.shape)
    for i in range(k):
        missed *= np.clip(n - c - i, 0, None) / (n - i)
    return 1.0 - missed


def average(samples: ArrayLike, correct: ArrayLike) -> Floats:
    """The share of right samples of each question [Q], whose mean is avg@k with k samples a question."""
    n, c = _counts(samples, correct)
    return c / n


def _counts(samples: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    n, c = np.broadcast_arrays(np.asarray(samples, float), np.asarray(correct, float))
    if c.ndim != 1:
        raise ValueError(f"correct has shape {c.shape}; expected one count a question")
    if (n < 1).any() or (c < 0).any() or (c > n).any() or (n % 1).any() or (c % 1).any():
        raise ValueError("expected whole numbers with 0 <= correct <= samples and samples >= 1")
    return n, c


def bootstrap(scores: ArrayLike, level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean of scores [Q] over questions, and the interval that resampled questions give.

    Percentiles of the bootstrap distribution, widened by sqrt(Q / (Q - 1)): the plain percentile interval is
    too narrow by that factor, as resampling takes the variance over Q and not Q - 1 (Hesterberg 2015). One
    question, or all scores equal, gives an interval of no width. The same seed gives the same interval.
    Raises ValueError.
    """
    values = np.asarray(scores, float)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError("expected at least one score, one a question, all finite")
    if not 0 < level < 1 or resamples < 1:
        raise ValueError(f"level is {level} and resamples {resamples}; expected 0 < level < 1 and at least 1")
    mean = float(values.mean())
    random = np.random.default_rng(seed)
    means = np.concatenate([_resampled(values, count, random) for count in _blocks(resamples, values.size)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    widened = np.sqrt(values.size / max(1, values.size - 1))
    low, high = (mean + widened * (end - mean) for end in (low, high))
    return Estimate(mean, max(float(low), values.min()), min(float(high), values.max()), level, values.size)


def _blocks(resamples: int, questions: int) -> Sequence[int]:
    size = max(1, BLOCK // questions)
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def _resampled(values: Floats, count: int, random: np.random.Generator) -> Floats:
    """Means of `count` resamples of the questions."""
    means: Floats = values[random.integers(0, values.size, (count, values.size))].mean(axis=1)
    return means


def avg_at_k(samples: ArrayLike, correct: ArrayLike, level: float = 0.95, seed: int = 0) -> Estimate:
    """avg@k over questions with its interval."""
    return bootstrap(average(samples, correct), level, seed)


def mean_pass_at_k(
    samples: ArrayLike, correct: ArrayLike, k: int, level: float = 0.95, seed: int = 0
) -> Estimate:
    """pass@k over questions with its interval."""
    return bootstrap(pass_at_k(samples, correct, k), level, seed)


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, ... up to the limit, and the limit."""
    powers = [2**i for i in range(limit.bit_length()) if 2**i <= limit]
    return powers if powers[-1] == limit else [*powers, limit]
