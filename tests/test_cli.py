"""The command `hpt`: exit codes, help with an example, and refusals that start nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hpt_mega.cli import CONFIG_ERROR, main
from hpt_mega.objective import rows


@pytest.mark.parametrize(
    "verb",
    ["train", "report", "algorithms", "diagnose-gradient", "convert", "checkpoints", "dryrun", "doctor"],
)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert "example: hpt" in capsys.readouterr().out


def test_a_refused_config_starts_nothing_and_leaves_nothing(
    model_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    code = main(["train", f"model.path={model_folder()}", f"run_dir={run_dir}", "parallel.tp=2"])
    assert code == CONFIG_ERROR
    assert "nothing was started" in capsys.readouterr().err
    assert not run_dir.exists()


def test_a_misspelt_key_is_an_error_of_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "experiment=demo", "trainer.step=3"]) == CONFIG_ERROR
    captured = capsys.readouterr().err
    assert captured.startswith("error: unknown key trainer.step; did you mean trainer.steps?")
    assert captured.count("\n") == 1


def test_the_table_of_algorithms_names_every_row_with_its_paper(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["algorithms"]) == 0
    printed = capsys.readouterr().out
    for row in rows():
        assert row.name in printed
    assert "2509.04419" in printed


def test_doctor_reports_as_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    versions = {package["name"]: package["version"] for package in found["packages"]}
    assert versions["megatron-core"] == "0.16.1"
    assert found["pieces"]["attention"]


def test_a_report_of_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path)]) == CONFIG_ERROR
    assert "metrics.jsonl" in capsys.readouterr().err
