"""Slow ranks are named, creeping memory is told once for each further growth, a hang leaves its stack."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from hpt_mega.telemetry import health, records
from hpt_mega.telemetry.health import Health, stragglers


def test_the_slowest_rank_of_a_phase_is_named_where_it_is_much_slower_than_the_others() -> None:
    timings = [{"rollout": 4.0, "train": 2.0}, {"rollout": 9.5, "train": 2.2}, {"rollout": 4.4, "train": 2.9}]
    assert stragglers(timings) == [{"phase": "rollout", "rank": 1, "seconds": 9.5, "median": 4.4}]


def test_a_phase_that_is_short_everywhere_has_no_straggler() -> None:
    assert stragglers([{"sync": 0.01}, {"sync": 0.9}, {"sync": 0.02}]) == []


def test_a_phase_that_only_one_rank_is_in_has_that_rank() -> None:
    assert stragglers([{"eval": 5.0}, {}, {}])[0]["rank"] == 0


@pytest.fixture
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_creeping_memory_is_told_once_for_each_further_growth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Health(tmp_path)
    for step, mib in enumerate([900] * 5 + [1000] * 5 + [1050, 1090, 1110, 1120, 1150, 1230, 1240], start=1):
        monkeypatch.setattr(health, "resident_bytes", lambda mib=mib: mib * 2**20)
        watch.observe(step, {"train": 1.0})
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["step 13", "step 16"]
    assert "rank 0 has grown by 11% since step 10" in said[0]
    assert len(records.read(tmp_path / "health.jsonl")) == 17


@pytest.mark.usefixtures("alone")
def test_what_the_allocator_can_give_back_is_no_growth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    held, kept = 1000, 0
    monkeypatch.setattr(health, "resident_bytes", lambda: (held + kept) * 2**20)

    def give_back() -> None:
        nonlocal kept
        kept = 0

    monkeypatch.setattr(health, "give_back_free_memory", give_back)
    watch = Health(tmp_path)
    for step in range(1, 21):
        kept += 4 if step < 10 else 20
        watch.observe(step, {"train": 1.0})
    seen = [record["rss"][0] >> 20 for record in records.read(tmp_path / "health.jsonl")]
    assert seen[:9] == [1000 + 4 * step for step in range(1, 10)]  # in warm-up all is let be
    assert seen[9:] == [1056, *[1000, 1020, 1040, 1060] * 2, 1000, 1020]
    assert capsys.readouterr().out == ""


def test_memory_in_the_midst_of_the_heap_is_given_back() -> None:
    script = (
        "from hpt_mega.telemetry.health import give_back_free_memory, resident_bytes\n"
        "blocks = [bytes(100_000) for _ in range(2_000)]\n"
        "del blocks[:-1]  # the last one holds the heap's end\n"
        "before = resident_bytes()\n"
        "give_back_free_memory()\n"
        "print((before - resident_bytes()) >> 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert int(done.stdout) > 95, done.stderr  # MiB, half of what was freed


def test_a_hang_in_a_library_leaves_the_stack_of_every_thread() -> None:
    program = (
        "import time, ctypes, threading\n"
        "from hpt_mega.telemetry.health import watch_for_hangs\n"
        "watch_for_hangs(1.0)\n"
        "def stuck(): ctypes.PyDLL(None).sleep(3)\n"  # holds the interpreter's lock
        "stuck()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0
    assert "Timeout (0:00:00.9" in ended.stderr
    assert "in stuck" in ended.stderr
