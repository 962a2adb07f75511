"""A sign that training harms the policy: its pass rate falls well below what it has been.

What is said goes to the terminal of rank 0 and into the report; the figures themselves are in metrics.jsonl.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean

import numpy as np

from hpt_mega.telemetry.records import Record
from hpt_mega.telemetry.summary import holds
from hpt_mega.telemetry.terminal import percent

WINDOW = 20  # steps at least: a single step's pass rate is that of its few questions
WINDOWS = 5  # in a run so far: the best of many would be good by chance
DROP = 0.2  # of the best window's pass rate; told again for each further one
SURE = 4.0  # standard errors of the difference of two windows
PASS_RATE = "pass_rate"
BESIDE = {"sft_fraction": "SFT share", "entropy": "entropy", "grad_norm": "gradient norm"}


def declines(records: Iterable[Record]) -> list[str]:
    """All that is to be told of a run."""
    decline = Decline()
    return [line for record in records if (line := decline.observe(record))]


class Decline:
    """Reads the records of a run's steps in order, those before a resume too."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._seen: dict[str, list[float]] = {name: [] for name in (PASS_RATE, *BESIDE)}
        self._told = 0.0  # the drop

    def observe(self, record: Record) -> str:
        """What to tell after this step; mostly nothing."""
        if PASS_RATE not in record:  # before training, or a run that takes no rollouts
            return ""
        self._steps.append(record["step"])
        for name, values in self._seen.items():
            values.append(float(record[name]) if holds(record, name) else math.nan)
        window = max(WINDOW, len(self._steps) // WINDOWS)
        if len(self._steps) < window:
            return ""
        rates = np.array(self._seen[PASS_RATE])
        sums = np.concatenate(([0.0], rates.cumsum()))
        best = int(np.argmax(sums[window:] - sums[:-window]))
        then, now = slice(best, best + window), slice(-window, None)
        fall = rates[then].mean() - rates[now].mean()
        if fall <= 0:  # as good as ever
            self._told = 0.0
        error = np.sqrt((rates[then].var(ddof=1) + rates[now].var(ddof=1)) / window)
        drop = fall / rates[then].mean() if fall > SURE * error else 0.0
        if drop < self._told + DROP:
            return ""
        self._told = drop
        return self._line(then, now)

    def _line(self, then: slice, now: slice) -> str:
        before, after = (
            {name: _mean(values[window]) for name, values in self._seen.items()} for window in (then, now)
        )
        beside = "".join(
            f", {told} {before[name]:.2g} → {after[name]:.2g}"
            for name, told in BESIDE.items()
            if not math.isnan(before[name] + after[name])
        )
        return (
            f"step {self._steps[-1]}: the pass rate has fallen from {percent(before[PASS_RATE])} (steps "
            f"{self._steps[then][0]} to {self._steps[then][-1]}) to {percent(after[PASS_RATE])} (since step "
            f"{self._steps[now][0]}){beside}; what helps: docs/operations.md"
        )


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return fmean(known) if known else math.nan
