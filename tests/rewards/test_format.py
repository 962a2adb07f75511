"""The form that LUFFY's system message asks for, met and missed."""

from __future__ import annotations

import time

import pytest

from hpt_mega.rewards import RewardPool
from hpt_mega.rewards.format import format_verdict


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think>\n1 + 1 = 2 </think>\n The answer is \\boxed{3}.", 1.0),
        ("1 + 1 = 2 </think>\n\\boxed{2}", 1.0),  # the prompt ended in <think>
        ("<think>so</think> the answer is 2", 0.0),
        ("<think>so \\boxed{2}</think> as I said", 0.0),
        ("<think> </think> \\boxed{2}", 0.0),
        ("\\boxed{2}", 0.0),
        ("<think>a</think><think>b</think> \\boxed{2}", 0.0),
        ("<think>a<think>b</think> \\boxed{2}", 0.0),
        ("first <think>a</think> \\boxed{2}", 0.0),
        ("a</think> then <think> \\boxed{2}", 0.0),
        ("<think>a</think> \\boxed{ } ", 0.0),
        ("<think>a</think> \\boxed{2", 0.0),
        ("", 0.0),
    ],
)
def test_thoughts_come_first_and_once_and_a_boxed_answer_after_them(response: str, reward: float) -> None:
    assert format_verdict(response, "7").reward == reward


def test_the_pool_knows_the_kind() -> None:
    with RewardPool("format") as pool:
        assert pool.score(["so</think> \\boxed{2}", "\\boxed{2}"], ["2", "2"]) == [1.0, 0.0]


@pytest.mark.parametrize("piece", ["<think>", "</think>", "\\boxed{", "<think>a</think>\\boxed{"])
def test_a_long_response_costs_milliseconds(piece: str) -> None:
    started = time.process_time()
    format_verdict(piece * 300_000, "7")
    assert time.process_time() - started < 1
