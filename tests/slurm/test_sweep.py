"""Sweeps: which jobs commas stand for, and which of them did not finish."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpt_mega.arguments import quoted
from hpt_mega.config import ConfigError, compose
from hpt_mega.evaluation.config import compose as compose_evaluation
from hpt_mega.slurm.__main__ import main
from hpt_mega.slurm.sweep import composed, expand, read_job, unfinished, write_jobs


def test_values_with_commas_are_combined_and_brackets_are_one_value() -> None:
    jobs = expand(["a=1,2", "b=[3,{c: 4, d: 5}],[6]", "e=x"])
    assert jobs == [
        ["a=1", "b=[3,{c: 4, d: 5}]", "e=x"],
        ["a=1", "b=[6]", "e=x"],
        ["a=2", "b=[3,{c: 4, d: 5}]", "e=x"],
        ["a=2", "b=[6]", "e=x"],
    ]


def test_commas_in_quotes_or_after_a_backslash_are_the_value_s_own() -> None:
    values = ["'Think, then answer'", '"Say \\"a, b\\", or [c"', r"it\'s\, so", "['],', d]", "plain"]
    jobs = expand([f"data.instruction={','.join(values)}"])
    assert jobs == [[f"data.instruction={value}"] for value in values]
    assert compose(jobs[0]).data.instruction == "Think, then answer"
    assert compose(jobs[1]).data.instruction == 'Say "a, b", or [c'


FOLDERS = ["/tmp/swü", "x=1/y", "a,b", "with space", "[a]{b}(c)", "it's", "a\"b'c", "~/a: b #c", "- a"]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_path_is_read_back_as_it_was_quoted(folder: str) -> None:
    assert compose([f"run_dir={quoted(folder)}"]).run_dir == folder
    assert compose_evaluation([f"model={quoted(folder)}", f"benchmarks=[{quoted(folder)}]"]).model == folder


def test_an_ordinary_path_stays_as_it_is() -> None:
    for path in ("runs/ablation/0", "/tmp/a-b_c.d+e@f/0", "./my runs/0"):
        assert quoted(path) == path


@pytest.mark.parametrize("name", ["swü", "x=1/y", "a,b", "with space"])
def test_a_sweep_may_have_any_folder(name: str, tmp_path: Path) -> None:
    write_jobs(tmp_path / name, expand(["seed=1,2"]))
    assert compose(read_job(tmp_path / name, 1)).run_dir == f"{tmp_path}/{name}/1"


@pytest.mark.parametrize("index", [-1, 2])
def test_a_job_that_a_sweep_does_not_have_is_refused(index: int, tmp_path: Path) -> None:
    write_jobs(tmp_path, expand(["seed=1,2"]))
    with pytest.raises(ConfigError, match=rf"got job {index} of .*jobs\.jsonl, expected 0 to 1; submit"):
        read_job(tmp_path, index)


@pytest.mark.parametrize("words", [["job", "FOLDER", "0"], ["sweep-report", "FOLDER"]])
def test_a_folder_that_holds_no_sweep_is_refused(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = [word.replace("FOLDER", str(tmp_path)) for word in words]
    monkeypatch.setattr("sys.argv", ["python -m hpt_mega.slurm", *given])
    assert main() == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: cannot read {tmp_path}/jobs.jsonl: No such file or directory; expected")


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
