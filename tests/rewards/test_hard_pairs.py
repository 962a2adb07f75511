"""The grader on hard pairs with a careful mathematician's verdicts, and the command that grades files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpt_mega.cli import main

PAIRS = Path(__file__).with_name("hard_pairs.jsonl")


def graded(lines: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """What `hpt grade` makes of the lines."""
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["grade", "--file", str(folder / "in.jsonl"), "--out", str(folder / "out.jsonl")]) == 0
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def test_no_wrong_answer_is_accepted_and_under_one_percent_of_right_ones_rejected(tmp_path: Path) -> None:
    pairs = [json.loads(line) for line in PAIRS.read_text().splitlines()]
    keys = ("answer", "response", "kind")
    verdicts = graded([{key: pair[key] for key in keys} for pair in pairs], tmp_path)
    right = [pair for pair in pairs if pair["verdict"] == 1]
    assert len(pairs) >= 300 and 100 < len(right) < len(pairs) - 100
    accepted = [p for p, v in zip(pairs, verdicts, strict=True) if v["reward"] and not p["verdict"]]
    rejected = [p for p, v in zip(pairs, verdicts, strict=True) if p["verdict"] and not v["reward"]]
    assert accepted == []
    assert len(rejected) < 0.01 * len(right), rejected
    assert all(verdict["why"] for verdict in verdicts)


def test_grades_keep_the_order_and_every_kind_has_its_own_rules(tmp_path: Path) -> None:
    lines = [
        {"answer": "B", "response": "Surely the answer is (B).", "kind": "choice"},
        {"answer": "B", "response": "The answer is C", "kind": "choice"},
        {"answer": "0.5", "response": r"\boxed{\frac12}", "kind": "math"},
        {"answer": "0.5", "response": r"\boxed{\frac12}", "kind": "exact"},
        {"answer": 3, "response": "3"},
    ]
    assert [verdict["reward"] for verdict in graded(lines, tmp_path)] == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2: no JSON"),
        ('{"answer": "1"}', 'line 2: expected {"answer"'),
        ('{"answer": null, "response": "1"}', "line 2: answer is null"),
        (
            '{"answer": "1", "response": "1", "kind": "maths"}',
            'line 2: kind is "maths", expected one of math',
        ),
    ],
)
def test_a_wrong_line_is_named_and_leaves_no_output(
    line: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"answer": "1", "response": "1"}\n' + line + "\n")
    assert main(["grade", "--file", str(source), "--out", str(out)]) == 1
    assert expected in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]
