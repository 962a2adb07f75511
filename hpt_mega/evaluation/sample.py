"""Questions asked of a rollout engine and graded: what `hpt eval` and the evaluation in training share.

Which questions and how often is decided by the callers, what counts becomes numbers in statistics.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hpt_mega.rewards.verdict import Verdict
from hpt_mega.rollout.engine import Sample, SamplingParams
from hpt_mega.trajectory import Question

Grade = Callable[[Sequence[str], Sequence[str]], list[Verdict]]  # (responses, gold answers)
Decode = Callable[[Sequence[int]], str]


class Respondent(Protocol):
    """The half of a RolloutEngine that an evaluation needs."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]: ...


@dataclass(frozen=True)
class Response:
    """One graded response."""

    text: str
    tokens: int
    finished: bool  # ended by itself, not by the length limit
    reward: float
    why: str
    given: str  # the answer that was graded


def respond(
    engine: Respondent,
    questions: Sequence[Question],
    sampling: SamplingParams,
    grade: Grade,
    decode: Decode,
) -> list[list[Response]]:
    """sampling.n graded responses to each question. All ranks of a replica call this together, and a replica
    without questions too: others may share its experts."""
    samples = engine.generate([question.prompt_tokens for question in questions], sampling)
    texts = [decode(sample.tokens) for group in samples for sample in group]
    answers = [q.answer for q, group in zip(questions, samples, strict=True) for _ in group]
    graded = iter(zip(texts, grade(texts, answers), strict=True))
    return [
        [
            Response(text, len(sample.tokens), sample.finished, verdict.reward, verdict.why, verdict.given)
            for sample, (text, verdict) in zip(group, graded, strict=False)
        ]
        for group in samples
    ]
