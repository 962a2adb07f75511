"""2,000 hostile answers: none costs more than its deadline, earns a reward, or is executed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpt_mega.rewards import RewardPool
from tests.rewards.hostile import GOLD, hostile

DEADLINE_S = 2.0


def test_hostile_answers_earn_nothing_and_none_outlasts_its_deadline(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    slowest = (0.0, "")
    with RewardPool("math", workers=1, deadline_s=DEADLINE_S) as pool:
        pool.score([r"\boxed{x}"], ["y"])  # its imports are over
        for response in hostile(2_000, seed=3, marker=str(marker)):
            started = time.monotonic()
            [verdict] = pool.verdicts([response], [GOLD])
            slowest = max(slowest, (time.monotonic() - started, response[:80]))
            assert verdict.reward == 0.0 and verdict.why, response[:200]
        assert pool.score([r"\boxed{\frac13+\sqrt7}"], [GOLD]) == [1.0]
    assert slowest[0] < DEADLINE_S + 1.0, slowest
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["choice", "exact"])
def test_hostile_answers_of_the_other_kinds_are_linear_too(kind: str, tmp_path: Path) -> None:
    with RewardPool(kind) as pool:
        for response in hostile(800, seed=4, marker=str(tmp_path / "executed")):
            started = time.monotonic()
            pool.verdicts([response], ["J"])
            assert time.monotonic() - started < 1.0, response[:80]
    assert not (tmp_path / "executed").exists()


def test_a_worker_cannot_take_more_memory_than_its_limit() -> None:
    script = "from hpt_mega.rewards.worker import limit_resources as f; f(512); bytearray(600 << 20)"
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and ended.stderr.strip().endswith("MemoryError")
    assert subprocess.run([sys.executable, "-c", script.replace("600", "100")], check=False).returncode == 0
