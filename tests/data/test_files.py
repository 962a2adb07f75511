"""Rows of files as records: JSON lines, JSON and parquet, column mappings, chats, choices, and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpt_mega.config import ColumnsConfig
from hpt_mega.data.files import Record, is_data, read_records


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


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
        (json.dumps({"prompt": "a", "answer": {"x": 3}}), "2: answer is"),
        (json.dumps({"answer": "3"}), "2: no prompt; the row has answer"),
        (json.dumps({"prompt": [{"role": "user"}]}), "expected messages with role and content"),
        (json.dumps({"prompt": [{"role": "system", "content": "x"}]}), "has messages of system"),
    ],
)
def test_a_wrong_line_is_named_with_what_was_expected(line: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line)
    with pytest.raises(ValueError, match=r"questions\.jsonl:2") as refused:
        list(read_records(path))
    assert expected in str(refused.value)


def test_a_file_that_is_not_in_utf_8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n' + '{"prompt": "größe"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.jsonl:2: not in UTF-8 .*; save the file in UTF-8"):
        list(read_records(path))


def test_a_misspelt_column_is_refused_and_a_foreign_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="column anwser is not known; did you mean answer"):
        list(read_records(write(tmp_path / "a.jsonl", {"prompt": "a", "anwser": "b"})))
    rows = read_records(write(tmp_path / "b.jsonl", {"prompt": "a", "ability": "math"}))
    assert list(rows) == [Record("a")]


def test_the_authors_benchmark_json_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "test.json"
    rows = [{"prompt": "$x$?", "answer": "\\boxed{204}"}, {"prompt": "y?", "answer": 7, "source": "math"}]
    path.write_text(json.dumps(rows, indent=2))
    assert list(read_records(path)) == [Record("$x$?", "\\boxed{204}"), Record("y?", "7")]


def test_a_mapping_reaches_into_nested_columns_and_chats(tmp_path: Path) -> None:
    row = {
        "data_source": "openr1",
        "prompt": [{"role": "system", "content": "think"}, {"role": "user", "content": "1 + 1?"}],
        "target": [{"role": "assistant", "content": "<think>\nso</think> 2"}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
    }
    columns = ColumnsConfig(answer="reward_model.ground_truth", demonstration="target", task="data_source")
    first, second = read_records(write(tmp_path / "openr1.jsonl", row, row | {"target": None}), columns)
    assert first == Record("1 + 1?", "2", "<think>\nso</think> 2", "", "openr1", (("system", "think"),))
    assert second.demonstration == ""


def test_a_named_column_must_be_there(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "a", "solution": "b"})
    with pytest.raises(ValueError, match="no column final for answer; the row has question, solution"):
        list(read_records(path, ColumnsConfig(prompt="question", answer="final")))


def test_a_chat_ends_in_its_demonstration_and_a_pair_in_its_two_responses(tmp_path: Path) -> None:
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "2?"), ("assistant", "two")]
    chat = [{"role": role, "content": content} for role, content in turns]
    (sft,) = read_records(write(tmp_path / "sft.jsonl", {"messages": chat}), ColumnsConfig(prompt="messages"))
    assert sft == Record("2?", demonstration="two", earlier=tuple(turns[:2]))
    pair = {"prompt": "2?", "chosen": chat, "rejected": "three"}
    columns = ColumnsConfig(demonstration="chosen")
    (record,) = read_records(write(tmp_path / "dpo.jsonl", pair), columns)
    assert (record.demonstration, record.rejected) == ("two", "three")


def test_choices_are_lettered_and_wrong_ones_are_mixed_in_the_same_way_each_time(tmp_path: Path) -> None:
    arc = {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    columns = ColumnsConfig(prompt="question", answer="answerKey", choices="choices")
    (record,) = read_records(write(tmp_path / "arc.jsonl", arc), columns)
    assert record == Record("Why?\n\n1. a\n2. b", "2")
    rows = [{"q": f"Q{i}", "right": "yes", "w1": "no", "w2": "never", "w3": "maybe"} for i in range(40)]
    gpqa = ColumnsConfig(prompt="q", answer="right", incorrect=["w1", "w2", "w3"])
    path = write(tmp_path / "gpqa.jsonl", *rows)
    records = list(read_records(path, gpqa))
    assert records == list(read_records(path, gpqa))
    assert {record.answer for record in records} == set("ABCD")
    assert all(f"{record.answer}. yes" in record.prompt for record in records)


def test_parquet_of_luffys_schema_is_read_by_the_same_mapping(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    rows = [
        {
            "prompt": [{"content": "think", "role": "system"}, {"content": f"{i}?", "role": "user"}],
            "target": [{"content": f"so {i}", "role": "assistant"}] if i % 3 else None,
            "reward_model": {"ground_truth": str(i), "style": "rule"},
        }
        for i in range(701)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "openr1.parquet")
    columns = ColumnsConfig(answer="reward_model.ground_truth", demonstration="target")
    records = list(read_records(tmp_path / "openr1.parquet", columns))
    assert [record.answer for record in records] == [str(i) for i in range(701)]
    assert [record.demonstration for record in records[:3]] == ["", "so 1", "so 2"]


def test_what_is_no_known_kind_of_data_is_refused(tmp_path: Path) -> None:
    assert is_data("hf:owner/name") and is_data("a.parquet") and not is_data("a.csv")
    with pytest.raises(ValueError, match=r"expected a file .jsonl, .json, .parquet, or hf:OWNER/NAME"):
        list(read_records(tmp_path / "a.csv"))
