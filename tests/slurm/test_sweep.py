"""Sweeps: which jobs commas stand for, and which of them did not finish."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpt_mega.config import ConfigError
from hpt_mega.slurm.sweep import composed, expand, read_job, unfinished, write_jobs


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


def test_a_job_has_a_folder_of_its_own_and_is_named_where_it_did_not_finish(tmp_path: Path) -> None:
    write_jobs(tmp_path, composed(["experiment=demo", "seed=1,2,3"]))
    assert read_job(tmp_path, 1) == ["experiment=demo", "seed=2", f"run_dir={tmp_path}/1"]
    for index in (0, 2):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "summary.json").touch()
    assert unfinished(tmp_path) == [f"experiment=demo seed=2 ({tmp_path}/1)"]
