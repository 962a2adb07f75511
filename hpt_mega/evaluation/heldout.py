"""Greedy accuracy on held-out questions, overall and by task, with any rollout engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpt_mega.rollout.engine import RolloutEngine, SamplingParams
from hpt_mega.trajectory import Question

Scorer = Callable[[Sequence[str], Sequence[str]], list[float]]


@dataclass(frozen=True)
class Accuracy:
    """Share of `count` questions answered rightly."""

    correct: int
    count: int

    @property
    def value(self) -> float:
        return self.correct / self.count if self.count else 0.0

    @property
    def standard_error(self) -> float:
        """Of a proportion: sqrt(p (1 - p) / n)."""
        return math.sqrt(self.value * (1 - self.value) / self.count) if self.count else 0.0

    def __add__(self, other: Accuracy) -> Accuracy:
        return Accuracy(self.correct + other.correct, self.count + other.count)


def evaluate(
    engine: RolloutEngine,
    questions: Sequence[Question],
    score: Scorer,
    decode: Callable[[Sequence[int]], str],
    max_new_tokens: int,
    stop_tokens: tuple[int, ...],
) -> dict[str, Accuracy]:
    """Accuracy by task of one greedy response a question."""
    sampling = SamplingParams(n=1, max_new_tokens=max_new_tokens, temperature=0.0, stop_tokens=stop_tokens)
    samples = engine.generate([question.prompt_tokens for question in questions], sampling)
    rewards = score([decode(s.tokens) for (s,) in samples], [question.answer for question in questions])
    by_task: dict[str, Accuracy] = {}
    for question, reward in zip(questions, rewards, strict=True):
        by_task[question.task] = by_task.get(question.task, Accuracy(0, 0)) + Accuracy(int(reward > 0.5), 1)
    return by_task


def overall(by_task: dict[str, Accuracy]) -> Accuracy:
    return sum(by_task.values(), Accuracy(0, 0))
