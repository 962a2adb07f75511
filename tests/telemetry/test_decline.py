"""A falling pass rate is told of, that of a real run that collapsed; one that varies is not."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from hpt_mega.telemetry.decline import Decline

# Of 128 rollouts a step: the lab's GRPO on its 5 M Llama at a learning rate of 1e-4, held out 22.6 -> 10.6 %.
COLLAPSED = [
    *(41, 44, 47, 28, 31, 47, 31, 59, 34, 41, 34, 22, 17, 38, 13, 16, 25, 23, 7, 27, 31, 28, 50, 19, 27),
    *(27, 41, 32, 41, 31, 24, 58, 30, 36, 32, 41, 44, 38, 32, 20, 10, 18, 25, 34, 32, 24, 33, 40, 31, 29),
    *(22, 10, 19, 28, 20, 30, 28, 22, 31, 39, 11, 16, 26, 15, 2, 25, 34, 14, 15, 28, 21, 32, 19, 5, 12),
    *(24, 23, 12, 4, 18, 22, 17, 13, 19, 14, 16, 29, 6, 13, 13, 10, 12, 15, 9, 24, 10, 12, 21, 3, 11),
]


def told(decline: Decline, rates: Iterable[float], first: int = 1, **beside: Sequence[float]) -> list[str]:
    lines = []
    for index, rate in enumerate(rates):
        record = {"step": first + index, "pass_rate": rate, "tokens_trained": 100.0}
        record |= {name: values[index] for name, values in beside.items()}
        lines.append(decline.observe(record))
    return [line for line in lines if line]


def test_a_run_that_collapsed_is_told_of_twice_long_before_its_end() -> None:
    rates = [passed / 128 for passed in COLLAPSED]
    entropy = [0.07 if step < 50 else 0.05 for step in range(100)]
    first, second = told(Decline(), rates, entropy=entropy)
    assert first == (
        "step 68: the pass rate has fallen from 26.9 % (steps 20 to 39) to 17.7 % (since step 49), "
        "entropy 0.07 → 0.052; what helps: docs/operations.md"
    )
    assert second.startswith("step 92: ")


def test_a_resumed_run_knows_what_was_before_it() -> None:
    rates = [passed / 128 for passed in COLLAPSED]
    whole, parts = Decline(), Decline()
    assert told(whole, rates) == told(parts, rates[:50]) + told(parts, rates[50:], first=51)


def test_a_run_that_only_varies_is_hardly_ever_told_of() -> None:
    alarms = 0
    for seed in range(30):
        drawn = random.Random(seed)  # as much as the run above: 16 questions a step
        alarms += bool(told(Decline(), [min(1, max(0, drawn.gauss(0.3, 0.11))) for _ in range(500)]))
    assert alarms <= 1


def test_a_short_dip_and_a_small_drop_are_not_told_of() -> None:
    assert told(Decline(), [0.5] * 40 + [0.0] * 3 + [0.5] * 40) == []
    assert told(Decline(), [0.5] * 40 + [0.42] * 60) == []


def test_a_run_that_recovered_is_told_of_anew() -> None:
    lines = told(Decline(), [0.5] * 20 + [0.2] * 20 + [0.6] * 40 + [0.45] * 40)
    assert [line.split(":")[0] for line in lines] == ["step 30", "step 37", "step 96"]


def test_the_entropy_of_a_step_that_trained_on_nothing_is_left_out() -> None:
    trained = [float(step % 2) for step in range(40)]
    entropy = [0.3 if any_ else 0.0 for any_ in trained]
    (line,) = told(Decline(), [0.5] * 20 + [0.1] * 20, tokens_trained=trained, entropy=entropy)[:1]
    assert "entropy 0.3 → 0.3" in line


def test_steps_that_take_no_rollouts_and_pass_rates_of_nothing_are_read() -> None:
    decline = Decline()
    assert decline.observe({"step": 0, "eval/accuracy": 0.2}) == ""
    assert told(decline, [0.0] * 60) == []
