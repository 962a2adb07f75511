"""The phase timer: where seconds go, and which phase a failure is laid to."""

from __future__ import annotations

import time

import pytest

from hpt_mega.telemetry import metrics
from hpt_mega.telemetry.metrics import PhaseTimer


class Clock:
    """A clock that only moves when told to."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def perf_counter(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(metrics.time, "perf_counter", made.perf_counter)
    return made


def test_an_inner_phase_is_not_counted_in_the_outer_one(clock: Clock) -> None:
    timer = PhaseTimer()
    with timer.phase("eval"):
        clock.seconds += 1
        with timer.phase("reward"):
            clock.seconds += 10
        clock.seconds += 2
    clock.seconds += 100
    assert timer.take() == {"eval": 3, "reward": 10, "step": 113}


def test_a_phase_entered_twice_adds_up(clock: Clock) -> None:
    timer = PhaseTimer()
    for _ in range(3):
        with timer.phase("train"):
            clock.seconds += 2
    assert timer.take() == {"train": 6, "step": 6}


def test_taking_starts_anew(clock: Clock) -> None:
    timer = PhaseTimer()
    with timer.phase("train"):
        clock.seconds += 2
    timer.take()
    clock.seconds += 5
    assert timer.take() == {"step": 5}


def test_a_phase_that_is_open_while_taking_is_split(clock: Clock) -> None:
    timer = PhaseTimer()
    with timer.phase("train"):
        clock.seconds += 2
        assert timer.take() == {"train": 2, "step": 2}
        clock.seconds += 3
    assert timer.take() == {"train": 3, "step": 3}


def test_the_current_phase_is_the_innermost() -> None:
    timer = PhaseTimer()
    assert timer.current is None
    with timer.phase("eval"):
        with timer.phase("reward"):
            assert timer.current == "reward"
        assert timer.current == "eval"
    assert timer.current is None


def test_after_a_failure_the_innermost_failed_phase_is_named() -> None:
    timer = PhaseTimer()
    with pytest.raises(KeyError), timer.phase("eval"), timer.phase("reward"):
        raise KeyError
    assert timer.current == "reward"


def test_a_failure_between_inner_phases_is_laid_to_the_outer_one() -> None:
    timer = PhaseTimer()

    def fail_after_an_inner_phase() -> None:
        with timer.phase("eval"):
            with timer.phase("reward"):
                pass
            raise KeyError

    with pytest.raises(KeyError):
        fail_after_an_inner_phase()
    assert timer.current == "eval"


def test_an_interrupt_is_a_failure_too() -> None:
    timer = PhaseTimer()
    with pytest.raises(KeyboardInterrupt), timer.phase("rollout"):
        raise KeyboardInterrupt
    assert timer.current == "rollout"


def test_a_failure_that_was_survived_is_forgotten(clock: Clock) -> None:
    timer = PhaseTimer()
    with pytest.raises(KeyError), timer.phase("rollout"):
        raise KeyError
    with timer.phase("train"):
        assert timer.current == "train"
        clock.seconds += 4
    assert timer.current is None
    assert timer.take() == {"rollout": 0, "train": 4, "step": 4}


def test_now_is_the_wall_clock() -> None:
    before = time.time()
    assert before <= PhaseTimer().now() <= time.time()
