"""A rank outlives no torchrun; what srun says of its tasks becomes one report: the first to fail, by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpt_mega.config import Config
from hpt_mega.launch import failure_report, run

SRUN = """srun: error: node1: task 5: Killed
srun: Terminating StepId=7.1
srun: error: node0: tasks 0-2,4: Terminated
srun: error: node1: tasks 6-7: Exited with exit code 1
"""


def test_a_rank_whose_torchrun_is_gone_already_does_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "busy.py").write_text("from pathlib import Path\nPath('began').touch()\n")
    ran = subprocess.run(
        [sys.executable, "-m", "hpt_mega.launch", "config.yaml", "busy"],
        cwd=tmp_path,
        env=os.environ | {"RANK": "0", "PYTHONPATH": f"{Path.cwd()}:{tmp_path}"},
        timeout=60,
        check=False,
    )
    assert ran.returncode == 1
    assert not (tmp_path / "began").exists()


def test_a_new_run_removes_the_logs_of_the_last_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hpt_mega.launch._supervise", lambda *given: 0)
    (tmp_path / "logs").mkdir()
    for name in ("rank0.log", "engine0.log", "torchrun.log", "failure_rank1.json", "mine.log"):
        (tmp_path / "logs" / name).touch()
    assert run(Config(), tmp_path / "config.yaml", "worker", 1) == 0
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["mine.log"]


def test_a_killed_task_comes_first_and_the_others_are_counted(tmp_path: Path) -> None:
    (tmp_path / "srun.log").write_text(SRUN)
    (tmp_path / "rank5.log").write_text("step 3\nstep 4\n")
    note = {"rank": 6, "phase": "train", "time": 1.0, "error": "RuntimeError: connection closed"}
    (tmp_path / "failure_rank6.json").write_text(json.dumps(note))
    report = failure_report(tmp_path)
    assert report.startswith("error: rank 5 was killed by SIGKILL; the machine may be out of memory")
    assert "(6 more failed after it)" in report
    assert "  | step 4" in report


def test_a_ranks_own_account_is_told_where_none_was_killed(tmp_path: Path) -> None:
    (tmp_path / "srun.log").write_text("srun: error: node0: tasks 0-1: Exited with exit code 1\n")
    for rank, time in ((0, 20.0), (1, 10.0)):
        note = {"rank": rank, "phase": "rollout", "time": time, "error": f"ValueError: {rank}"}
        (tmp_path / f"failure_rank{rank}.json").write_text(json.dumps(note))
    assert failure_report(tmp_path).startswith("error: rank 1 failed in phase rollout: ValueError: 1 (1 more")


def test_a_job_that_srun_could_not_start_shows_what_srun_said(tmp_path: Path) -> None:
    (tmp_path / "srun.log").write_text("srun: error: Unable to create step for job 4: no such image\n")
    assert "no such image" in failure_report(tmp_path)
