"""The run's log: what is in its files after runs, kills and resumes, and what the terminal shows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpt_mega.config import Config
from hpt_mega.telemetry.run import RunLog
from tests.telemetry.conftest import QUESTIONS, VERDICTS, final, initial, log_whole_run, trained

OpenLog = Callable[..., RunLog]


def lines(cfg: Config, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(cfg.run_dir) / name).read_text().splitlines()]


def test_a_run_leaves_its_records_summary_and_report(cfg: Config, open_log: OpenLog) -> None:
    log_whole_run(open_log())
    assert lines(cfg) == [initial(), trained(1), trained(2), trained(3, **final())]
    summary = json.loads((Path(cfg.run_dir) / "summary.json").read_text())
    assert (summary["initial_accuracy"], summary["final_accuracy"], summary["steps"]) == (0.2, 0.5, 3)
    assert (Path(cfg.run_dir) / "report.html").is_file()


def test_a_record_is_on_disk_once_it_was_given(cfg: Config, open_log: OpenLog) -> None:
    with open_log() as log:
        log.record(0, initial())
        assert lines(cfg) == [initial()]


def test_samples_of_the_first_two_questions_are_kept(cfg: Config, open_log: OpenLog) -> None:
    with open_log() as log:
        log.samples(4, QUESTIONS, ["a", "b", "c", "d", "e", "f"], VERDICTS)
    one, two = ({"step": 4, "question": f"What is {i} + {i}?", "answer": str(2 * i)} for i in (1, 2))
    assert lines(cfg, "samples.jsonl") == [
        one | {"response": "a", "reward": 0, "why": "another number"},
        one | {"response": "b", "reward": 1, "why": "same number"},
        two | {"response": "c", "reward": 0, "why": "another number"},
        two | {"response": "d", "reward": 0, "why": "another number"},
    ]


def test_a_step_without_questions_leaves_no_samples(cfg: Config, open_log: OpenLog) -> None:
    with open_log() as log:
        log.samples(1, [], [], [])
    assert lines(cfg, "samples.jsonl") == []


def test_other_ranks_write_and_print_nothing(
    cfg: Config, open_log: OpenLog, capsys: pytest.CaptureFixture[str]
) -> None:
    log_whole_run(open_log(rank=1))
    assert [path.name for path in Path(cfg.run_dir).iterdir()] == ["config.yaml"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("damage", ["", "no JSON\n"])
def test_a_fresh_run_begins_with_empty_files(cfg: Config, open_log: OpenLog, damage: str) -> None:
    log_whole_run(open_log())
    with (Path(cfg.run_dir) / "metrics.jsonl").open("a") as file:
        file.write(damage)
    with open_log():
        assert lines(cfg) == [] and lines(cfg, "samples.jsonl") == []
        assert not (Path(cfg.run_dir) / "summary.json").exists()


@pytest.mark.parametrize("torn", ["", '{"step": 3, "rew'])
def test_a_resumed_run_reads_as_one_never_interrupted(cfg: Config, open_log: OpenLog, torn: str) -> None:
    log_whole_run(open_log())
    names = ("metrics.jsonl", "samples.jsonl")
    whole = {name: (Path(cfg.run_dir) / name).read_bytes() for name in names}
    for name in names:
        with (Path(cfg.run_dir) / name).open("a") as file:
            file.write(torn)
    with open_log(resume_step=1) as log:
        assert [record["step"] for record in lines(cfg)] == [0, 1]
        assert {record["step"] for record in lines(cfg, "samples.jsonl")} == {1}
        assert not (Path(cfg.run_dir) / "summary.json").exists()
        for step in (2, 3):
            texts = [f"step {step}, response {i}" for i in range(6)]
            log.samples(step, QUESTIONS, texts, VERDICTS)
            log.record(step, trained(step, **(final() if step == 3 else {})))
        log.finish({})
    assert {name: (Path(cfg.run_dir) / name).read_bytes() for name in names} == whole
    summary = json.loads((Path(cfg.run_dir) / "summary.json").read_text())
    assert summary["steps"] == 3 and summary["seconds"]["total"] == 3 * 6.5


def test_a_run_that_fails_leaves_no_summary(cfg: Config, open_log: OpenLog) -> None:
    def fail_after_the_first_evaluation() -> None:
        with open_log() as log:
            log.record(0, initial())
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_after_the_first_evaluation()
    assert lines(cfg) == [initial()]
    assert not (Path(cfg.run_dir) / "summary.json").exists()


def test_a_resumed_run_tells_of_a_pass_rate_that_falls_from_before(
    cfg: Config, open_log: OpenLog, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log() as log:
        for step in range(1, 31):
            log.record(step, trained(step, pass_rate=0.5))
    with open_log(resume_step=25) as log:
        for step in range(26, 41):
            log.record(step, trained(step, pass_rate=0.1))
    lines = capsys.readouterr().out.splitlines()
    (warning,) = [line for line in lines if "the pass rate has fallen" in line]
    assert warning.startswith("step 35: the pass rate has fallen from 50.0 % (steps 1 to 20) to 30.0 %")


def test_seconds_after_the_last_record_count_in_the_summary(cfg: Config, open_log: OpenLog) -> None:
    with open_log() as log:
        log.record(0, initial())
        log.finish({"export": 2.0, "step": 3.0})
    seconds = json.loads((Path(cfg.run_dir) / "summary.json").read_text())["seconds"]
    assert (seconds["export"], seconds["total"]) == (2.0, 3.0)


def test_matplotlib_is_not_loaded_before_the_report() -> None:
    code = "import sys, hpt_mega.telemetry.run; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
