"""Gold answers in the benchmarks' formats against themselves, against perturbed ones, and in any process."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hpt_mega.rewards import RewardPool

GOLDS: list[str] = json.loads(Path(__file__).with_name("golds.json").read_text())
PAIRS = [json.loads(line) for line in Path(__file__).with_name("hard_pairs.jsonl").read_text().splitlines()]


def perturbed(gold: str) -> list[str]:
    """One digit off, one more, twice as much: never equal to the gold answer."""
    places = [match.start() for match in re.finditer(r"\d", gold)]
    digits = [gold[:at] + str((int(gold[at]) + 1) % 10) + gold[at + 1 :] for at in places]
    return [*digits, f"{gold} + 1", f"2({gold})"]


def test_a_gold_answer_is_right_against_itself_however_it_is_stated() -> None:
    ways = [
        r"\boxed{%s}",
        "The answer is $%s$.",
        "The answer is %s.",
        "%s",
        "So $$\\boxed{%s}$$",
        "**Answer:** $%s$",
    ]
    asked = [(way % gold, gold) for gold in GOLDS for way in ways]
    with RewardPool(workers=2) as pool:
        verdicts = pool.verdicts(*zip(*asked, strict=True))
    assert [pair for pair, verdict in zip(asked, verdicts, strict=True) if verdict.reward != 1.0] == []


def test_a_perturbed_gold_answer_is_wrong() -> None:
    asked = [
        (way % other, gold)
        for gold in GOLDS
        for other in perturbed(gold)
        for way in (r"\boxed{%s}", "The answer is $%s$.")
    ]
    with RewardPool(workers=2) as pool:
        verdicts = pool.verdicts(*zip(*asked, strict=True))
    assert len(asked) > 1_000
    assert [pair for pair, verdict in zip(asked, verdicts, strict=True) if verdict.reward != 0.0] == []


def test_verdicts_and_reasons_are_the_same_with_other_workers_order_and_threads() -> None:
    asked = [(pair["response"], pair["answer"]) for pair in PAIRS if pair["kind"] == "math"]
    with RewardPool(workers=1) as pool:
        alone = pool.verdicts(*zip(*asked, strict=True))
    with RewardPool(workers=3) as pool, ThreadPoolExecutor(4) as threads:
        assert pool.verdicts(*zip(*asked[::-1], strict=True)) == alone[::-1]
        parts = list(threads.map(lambda i: pool.verdicts(*zip(*asked[i::7], strict=True)), range(7)))
    assert parts == [alone[i::7] for i in range(7)]
