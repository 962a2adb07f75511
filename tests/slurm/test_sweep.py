"""Sweeps: which jobs commas stand for, and the table of their runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpt_mega.config import ConfigError
from hpt_mega.slurm.sweep import composed, expand, read_job, report, write_jobs


def test_values_with_commas_are_combined_and_brackets_are_one_value() -> None:
    jobs = expand(["a=1,2", "b=[3,{c: 4, d: 5}],[6]", "e=x"])
    assert jobs == [
        ["a=1", "b=[3,{c: 4, d: 5}]", "e=x"],
        ["a=1", "b=[6]", "e=x"],
        ["a=2", "b=[3,{c: 4, d: 5}]", "e=x"],
        ["a=2", "b=[6]", "e=x"],
    ]


def test_a_misspelt_key_ends_a_sweep_before_it_is_submitted() -> None:
    with pytest.raises(ConfigError, match=r"did you mean trainer\.steps"):
        composed(["trainer.stepz=1,2"])


def test_a_sweep_is_not_written_over_another(tmp_path: Path) -> None:
    write_jobs(tmp_path, expand(["seed=1,2"]))
    write_jobs(tmp_path, expand(["seed=1,2"]))
    with pytest.raises(ConfigError, match="holds another sweep"):
        write_jobs(tmp_path, expand(["seed=1,2,3"]))
    assert len((tmp_path / "jobs.jsonl").read_text().splitlines()) == 2


def test_runs_are_compared_by_what_was_swept_best_first(tmp_path: Path) -> None:
    write_jobs(tmp_path, composed(["experiment=demo", "seed=1,2,3"]))
    assert read_job(tmp_path, 1) == ["experiment=demo", "seed=2", f"run_dir={tmp_path}/1"]
    for index, accuracy in ((0, 0.25), (2, 0.5)):
        (tmp_path / str(index)).mkdir()
        summary = {"initial_accuracy": 0.125, "final_accuracy": accuracy, "steps": 7}
        (tmp_path / str(index) / "summary.json").write_text(json.dumps(summary))
    lines = report(tmp_path).splitlines()
    assert lines[0] == "# 3 runs with experiment=demo"
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["seed=3", "seed=1", "seed=2"]
    assert "did not finish" in lines[-1]
    assert (tmp_path / "report.md").is_file()
