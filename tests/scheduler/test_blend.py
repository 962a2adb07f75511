"""HPT's blend: which trajectories a step trains on, and that no question disappears silently."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hpt_mega.scheduler import gate, schedule
from hpt_mega.trajectory import Question, Source, Trajectory


def question(name: str, demonstration: tuple[int, ...] = (5, 6, 2)) -> Question:
    return Question(name, "task", "prompt", "answer", "text", (1, 3), demonstration)


def rollouts(group: int, rewards: list[float]) -> list[Trajectory]:
    return [
        Trajectory((1, 3), (4 + i, 2), group, Source.ONLINE, 7, (-0.1, -0.2), reward)
        for i, reward in enumerate(rewards)
    ]


def test_the_switch_keeps_the_rollouts_or_takes_the_demonstration() -> None:
    made = [rollouts(10, [0, 0, 0]), rollouts(11, [1, 0, 0])]
    step = schedule(made, [question("a"), question("b")], gate("switch"), policy_version=7, first_group=10)
    demonstration = Trajectory((1, 3), (5, 6, 2), 10, Source.OFFLINE, 7, reward=1.0, weight=1.0)
    assert step.trajectories == [demonstration, *made[1]]
    assert step.pass_rate.tolist() == [0, pytest.approx(1 / 3)]
    assert (step.alpha.tolist(), step.beta.tolist(), step.sft_fraction) == ([0, 1], [1, 0], 0.5)


def test_soft_weights_travel_with_the_trajectories() -> None:
    made = [rollouts(0, [1, 0, 0, 0]), rollouts(1, [1, 1, 1, 1])]
    step = schedule(made, [question("a"), question("b")], gate("linear"), policy_version=0)
    assert [t.weight for t in step.trajectories] == [0.25] * 4 + [0.75] + [1.0] * 4
    assert [t.source for t in step.trajectories] == [0] * 4 + [1] + [0] * 4
    assert [t.group for t in step.trajectories] == [0] * 5 + [1] * 4
    assert step.sft_fraction == 0.5


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_a_question_without_the_demonstration_it_needs_is_named(threshold: float) -> None:
    with pytest.raises(ValueError, match="question 'q-17' has no demonstration"):
        schedule([rollouts(0, [0, 0])], [question("q-17", ())], gate("switch", threshold=threshold), 0)


def test_a_question_that_needs_no_demonstration_may_lack_one() -> None:
    step = schedule([rollouts(0, [0, 0])], [question("q", ())], gate("switch", threshold=-1), 0)
    assert len(step.trajectories) == 2 and step.sft_fraction == 0


def test_a_question_without_rollouts_among_others_is_named() -> None:
    with pytest.raises(ValueError, match="question 'q-3' has no rollouts"):
        schedule([rollouts(0, [1]), []], [question("q-2"), question("q-3")], gate("switch"), 0)


def test_without_any_rollouts_every_question_counts_as_never_solved() -> None:
    asked = [question("a"), question("b")]
    step = schedule([[], []], asked, gate("switch"), policy_version=3, first_group=6)
    assert step.pass_rate.tolist() == [0, 0]
    assert [(t.group, t.source, t.policy_version) for t in step.trajectories] == [(6, 1, 3), (7, 1, 3)]


def test_a_pair_from_a_file_is_the_demonstration_and_what_it_is_preferred_to() -> None:
    asked = [replace(question("a"), rejected_tokens=(8, 2)), question("b")]
    step = schedule([[], []], asked, gate("switch"), 0, pairs=True)
    assert [(t.response_tokens, t.reward, t.pair) for t in step.trajectories] == [
        ((5, 6, 2), 1, 0),
        ((8, 2), 0, 0),
    ]


def test_rollouts_and_questions_must_match() -> None:
    with pytest.raises(ValueError, match="rollouts for 1 questions and 2 questions"):
        schedule([rollouts(0, [1])], [question("a"), question("b")], gate("switch"), 0)


def test_a_step_without_questions_is_an_empty_schedule() -> None:
    step = schedule([], [], gate("switch"), 0)
    assert step.trajectories == [] and step.sft_fraction == 0 and step.alpha.dtype == torch.float64


def test_pairs_are_the_best_and_the_worst_of_each_question_and_ties_have_none() -> None:
    made = [rollouts(4, [0, 1, 0, 1]), rollouts(5, [1, 1]), rollouts(6, [0, 0])]
    asked = [question("a"), question("b"), question("c")]
    alone = schedule(made, asked, gate("switch", threshold=-1), 0, True, 4).trajectories
    assert [(t.response_tokens, t.reward, t.pair) for t in alone] == [((5, 2), 1, 4), ((4, 2), 0, 4)]
    joined = schedule(made, asked, gate("soft", threshold=1), 0, True, 4).trajectories
    assert [(t.source, t.reward, t.pair) for t in joined[2:]] == [
        (Source.OFFLINE, 1, 6),
        (Source.ONLINE, 0, 6),
    ]
