"""Accuracy on held-out questions in training, overall and by task, with any rollout engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpt_mega.evaluation.sample import Decode, Grade, Respondent, respond
from hpt_mega.rollout.engine import SamplingParams
from hpt_mega.trajectory import Question


@dataclass(frozen=True)
class Accuracy:
    """The mean over `count` questions of each one's share of right responses."""

    total: float  # of the shares
    count: int
    squares: float  # of the shares, added up

    @classmethod
    def of(cls, share: float) -> Accuracy:
        return cls(share, 1, share * share)

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0

    @property
    def standard_error(self) -> float:
        """Of the mean over questions; with one response each, that of a proportion: sqrt(p (1 - p) / n)."""
        if not self.count:
            return 0.0
        variance = max(0.0, self.squares / self.count - self.value**2)
        return math.sqrt(variance / self.count)

    def __add__(self, other: Accuracy) -> Accuracy:
        return Accuracy(self.total + other.total, self.count + other.count, self.squares + other.squares)


NONE = Accuracy(0.0, 0, 0.0)


def evaluate(
    engine: Respondent,
    questions: Sequence[Question],
    sampling: SamplingParams,
    grade: Grade,
    decode: Decode,
) -> dict[str, Accuracy]:
    """Accuracy by task of sampling.n responses a question."""
    by_task: dict[str, Accuracy] = {}
    groups = respond(engine, questions, sampling, grade, decode)
    for question, responses in zip(questions, groups, strict=True):
        share = sum(response.reward > 0.5 for response in responses) / len(responses)
        by_task[question.task] = by_task.get(question.task, NONE) + Accuracy.of(share)
    return by_task


def overall(by_task: dict[str, Accuracy]) -> Accuracy:
    return sum(by_task.values(), NONE)
