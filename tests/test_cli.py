"""The command `hpt`: exit codes, help with an example, and refusals that start nothing."""

from __future__ import annotations

import json
import subprocess
import sys
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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["dryrun", "experiment=tiny", "--ranks", "0", "algorithm=pppo"], "algorithm=pppo: no such choice"),
        (["plan", "gpus=8", "--json", "modell=a"], "unknown key modell"),
    ],
)
def test_settings_may_stand_on_both_sides_of_an_option(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == CONFIG_ERROR
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "--steps", "5"], "hpt train: unrecognized arguments: --steps; it takes KEY=VALUE"),
        (["dryrun", "--nope", "seed=1"], "hpt dryrun: unrecognized arguments: --nope; it takes KEY=VALUE"),
        (["grade", "--file", "a", "--out", "b", "--workers", "0"], "--workers: '0' given, expected a whole"),
        (
            ["grade", "--file", "a", "--out", "b", "--memory-mib", "1"],
            "expected a whole number of 256 or abo",
        ),
        (
            ["grade", "--file", "a", "--out", "b", "--deadline", "0"],
            "--deadline: '0' given, expected seconds",
        ),
        (
            ["convert", "hf-to-megatron", "--hf", "a", "--out", "b", "--tp", "x"],
            "--tp: 'x' given, expected a",
        ),
    ],
)
def test_a_wrong_option_is_told_what_was_expected(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == CONFIG_ERROR
    assert expected in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text('{"answer": "1", "response": "1"}\n')
    below = tmp_path / "file" / "out"
    monkeypatch.setattr(
        "hpt_mega.objective.diagnosis.diagnose_gradient",
        lambda *given, **more: pytest.fail("computed in vain"),
    )
    for arguments in (
        ["diagnose-gradient", "--out", str(below)],
        ["lab", "--quick", "--out", str(below)],
        ["grade", "--file", str(tmp_path / "file"), "--workers", "1", "--out", str(tmp_path / "no" / "out")],
    ):
        assert main(arguments) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1
        assert (str(below) if "grade" not in arguments else str(tmp_path / "no" / "out")) in said
    assert ".partial" not in said


def test_in_a_rank_an_error_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(NotADirectoryError):
        main(["diagnose-gradient", "--out", str(tmp_path / "file" / "out")])


def test_an_interruption_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hpt_mega.planning.command.parse", interrupted)
    assert main(["plan", "gpus=8"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_who_stops_reading_is_no_error() -> None:
    command = [sys.executable, "-m", "hpt_mega.cli", "algorithms", "--markdown"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(120) == 141


def test_verifying_no_checkpoints_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").touch()
    assert main(["checkpoints", "list", str(tmp_path)]) == 0
    assert main(["checkpoints", "verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("has no checkpoints") == 2


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
