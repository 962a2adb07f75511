"""Accuracy by task with an engine of given answers, and its standard error against numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from hpt_mega.evaluation.heldout import Accuracy, evaluate, overall
from hpt_mega.evaluation.sample import respond
from hpt_mega.rewards.verdict import Verdict
from hpt_mega.rollout.engine import Sample, SamplingParams
from hpt_mega.trajectory import Question

RIGHT = {1: (1, 1, 0, 1, 0), 2: (0, 0, 0, 0, 0), 3: (1, 1, 1, 1, 1), 4: (0, 0, 1, 0, 0)}


class Scripted:
    """Answers question q rightly in the samples of RIGHT[q]."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        return [[Sample((r,), (0.0,), True, 0) for r in RIGHT[p[0]][: sampling.n]] for p in prompts]


def grade(texts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
    return [Verdict(float(text == answer), "", text) for text, answer in zip(texts, answers, strict=True)]


@pytest.mark.parametrize("n", [1, 5])
def test_accuracy_is_the_mean_over_questions_of_the_share_of_right_samples(n: int) -> None:
    tasks = {1: "sums", 2: "sums", 3: "words", 4: "sums"}
    questions = [Question(str(i), task, "", "1", "", (i,), ()) for i, task in tasks.items()]
    found = evaluate(Scripted(), questions, SamplingParams(n, 4), grade, lambda tokens: str(tokens[0]))
    groups = respond(Scripted(), questions, SamplingParams(n, 4), grade, lambda tokens: str(tokens[0]))
    assert [int(one.given) for one in groups[0]] == list(RIGHT[1][:n])
    shares = {i: np.mean(RIGHT[i][:n]) for i in tasks}
    assert found["sums"].value == pytest.approx(np.mean([shares[i] for i in (1, 2, 4)]))
    total = overall(found)
    assert total.count == 4
    assert total.value == pytest.approx(np.mean(list(shares.values())))
    assert total.standard_error == pytest.approx(np.std(list(shares.values())) / 2)


def test_nothing_asked_gives_no_accuracy_and_no_division_by_zero() -> None:
    assert overall({}) == Accuracy(0.0, 0, 0.0)
    assert overall({}).value == overall({}).standard_error == 0.0
