"""What a verdict is about: the answer that its kind read in the response, and none where it found none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hpt_mega.rewards import RewardPool

OWN = "tests.rewards.own_rewards"


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(deadline_s=20.0) as pool:
        yield pool


@pytest.mark.parametrize(
    ("kind", "response", "answer", "reward", "given"),
    [
        ("math", "so the answer is 7.", "7", 1.0, "7"),
        ("math", r"2, so \boxed{12 + 7}", "19", 0.0, "12 + 7"),
        ("math", r"so \boxed{\sqrt{8}}", r"2\sqrt{2}", 1.0, r"\sqrt{8}"),  # a worker's
        ("math", "blue", "blue", 1.0, "blue"),
        ("math", "no idea", "7", 0.0, ""),
        ("choice", "2 of 3 say: the answer is (B)", "C", 0.0, "B"),
        ("choice", "the answer is (2)", "2", 1.0, "2"),
        ("choice", "the answer is (2)", "B", 0.0, ""),
        ("exact", "the answer is light  blue", "light blue", 1.0, "light  blue"),
        ("exact", r"it is 7, \boxed{seven}", "7", 0.0, "seven"),
        ("exact", "x " * 600, "7", 0.0, ""),
        ("format", r"<think>2</think> \boxed{3}", "7", 1.0, "3"),
        ("format", r"<think>\boxed{2}</think> 3", "7", 0.0, ""),
        (f"{OWN}.length", "what it is", "20", 0.5, "what it is"),
        (f"{OWN}.length", "", "20", 0.0, ""),
        (f"{OWN}.broken", "a" * 3000, "20", 0.0, "a" * 1000),
    ],
)
def test_a_verdict_says_which_answer_it_is_about(
    pool: RewardPool, kind: str, response: str, answer: str, reward: float, given: str
) -> None:
    [verdict] = pool.verdicts([response], [answer], [kind])
    assert (verdict.reward, verdict.given) == (reward, given), verdict.why
