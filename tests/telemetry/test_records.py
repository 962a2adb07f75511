"""JSON lines that survive kills."""

from __future__ import annotations

from pathlib import Path

import pytest

from hpt_mega.telemetry import records


def test_records_are_read_as_they_were_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records.append(path, {"step": 0, "a": 0.1})
    records.append(path, {"step": 1, "text": "line\nbreak, ü, \u2028"}, {"step": 2})
    assert path.read_text().count("\n") == 3
    assert records.read(path) == [
        {"step": 0, "a": 0.1},
        {"step": 1, "text": "line\nbreak, ü, \u2028"},
        {"step": 2},
    ]


def test_an_absent_file_holds_no_records(tmp_path: Path) -> None:
    assert records.read(tmp_path / "metrics.jsonl") == []


@pytest.mark.parametrize("torn", ["{", '{"step": 2, "lo', '{"step": 2}'])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + torn)
    assert records.read(path) == [{"step": 1}]


@pytest.mark.parametrize("damage", ["nonsense", "[1]", ""])
def test_damage_elsewhere_is_named_by_file_and_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{damage}\n{{"step": 2}}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: .*expected"):
        records.read(path)


def test_a_line_without_a_needed_key_is_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"loss": 1}\n')
    assert records.read(path, "loss") == [{"step": 1, "loss": 2}, {"loss": 1}]
    for refused in (lambda: records.read(path, "step", "loss"), lambda: records.cut(path, 1)):
        with pytest.raises(records.DamagedFileError, match=r"metrics\.jsonl, line 2 holds no step; expected"):
            refused()


def test_cutting_leaves_earlier_lines_byte_for_byte(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records.append(path, *({"step": step, "loss": step / 3, "nan": float("nan")} for step in range(5)))
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:3])
    with path.open("a") as file:
        file.write('{"step": 5, "lo')
    records.cut(path, 2)
    assert path.read_bytes() == kept
