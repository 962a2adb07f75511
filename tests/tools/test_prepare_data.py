"""The command that prepares data: its mapping of columns, its errors. What it writes: tests/data."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "prepare_data.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("prepare_data", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare_data"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--data", "a.csv"], 1, "expected a file .jsonl, .json, .parquet, or hf:OWNER/NAME"),
        (["--data", "a.jsonl", "--columns", "question"], 2, "expected NAME=COLUMN with a name of prompt"),
        (["--data", "a.jsonl", "--benchmarks", "aime"], 2, "is none of conf/benchmark"),
    ],
)
def test_what_cannot_be_read_is_refused_with_what_was_expected(
    arguments: list[str],
    code: int,
    expected: str,
    tool: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests.data.byte_tokenizer import byte_tokenizer

    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    given = [*arguments, "--tokenizer", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out")]
    assert tool.main(given) == code
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value", "least"),
    [
        ("--max-prompt-tokens", "0", 1),
        ("--max-demonstration-tokens", "-1", 1),
        ("--max-demonstration-tokens", "0", 1),
        ("--rows", "-1", 0),
        ("--workers", "0", 1),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_option(
    option: str, value: str, least: int, tool: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        tool.main(["--data", "a.jsonl", "--tokenizer", "t", "--out", "o", option, value])
    expected = f"argument {option}: '{value}' given, expected a whole number of {least} or above"
    assert expected in capsys.readouterr().err


def test_a_tokenizer_is_looked_for_on_this_machine_only(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data", "a.jsonl", "--tokenizer", "nosuch", "--out", str(tmp_path / "out")]
    assert tool.main(given) == 2
    assert "--tokenizer nosuch: no such folder (looked for /" in capsys.readouterr().err


def test_a_mapping_is_known_by_name_or_spelt_out(tool: ModuleType) -> None:
    assert tool._columns(["openr1"]).answer == "reward_model.ground_truth"
    assert tool._columns(["prompt=problem", "incorrect=[a,b]"]).incorrect == ["a", "b"]
