"""Questions from JSON lines: what is read, and what a wrong line is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hpt_mega.data.files import Record, read_records


def test_lines_are_read_in_order_and_absent_columns_are_empty(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        '{"prompt": "1 + 1?", "answer": "2"}\n\n{"prompt": "π?", "rejected": "3", "task": "geo"}\n'
    )
    assert list(read_records(path)) == [Record("1 + 1?", "2"), Record("π?", rejected="3", task="geo")]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "2: no JSON"),
        ("[1]", "2: got list, expected an object"),
        (json.dumps({"prompt": "a", "anwser": "b"}), "2: unknown columns anwser; known: answer"),
        (json.dumps({"prompt": "a", "answer": 3}), "2: answer is 3, expected a text"),
        (json.dumps({"answer": "3"}), "2: no prompt"),
    ],
)
def test_a_wrong_line_is_named_with_what_was_expected(line: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(ValueError, match=r"questions\.jsonl:2") as refused:
        list(read_records(path))
    assert expected in str(refused.value)
