"""Prepared folders: the tokens that the file itself gives, Megatron's own reader, the report, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpt_mega.config import ColumnsConfig, DataConfig, TaskConfig
from hpt_mega.data.prepare import Settings, prepare
from hpt_mega.data.questions import QuestionSet, check_complete, load_questions
from hpt_mega.data.store import StoredQuestions, TokenFile
from tests.data.byte_tokenizer import byte_tokenizer

pytestmark = pytest.mark.timeout(180)
ROWS = 301
SHARED = "Every morning Aya goes for a walk of nine kilometres and stops at a coffee shop afterwards"


def row(i: int) -> dict[str, Any]:
    text = f"{SHARED}. And {i}?" if i == 5 else f"What is {i} + 1? " + "long " * (80 * (i == 7))
    if i == 11:
        text += "\u2028\u0085"  # str.splitlines() parts lines there
    if i == 9:
        text = "what is 8 +  1?"  # as row 8 but for white space and case
    return {
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": text}],
        "target": None if i % 50 == 3 else [{"role": "assistant", "content": f"so {i + 1}" * (1 + i % 13)}],
        "reward_model": {"ground_truth": str(i + 1), "style": "rule"},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in LUFFY's columns, and a tokenizer."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "openr1.jsonl").write_text("\n".join(json.dumps(row(i)) for i in range(ROWS)))
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


def settings(folder: Path, **changes: Any) -> Settings:
    asked = Settings(
        source=str(folder / "openr1.jsonl"),
        tokenizer=str(folder / "tokenizer"),
        columns=ColumnsConfig(answer="reward_model.ground_truth", demonstration="target"),
        keep_system=False,
        max_prompt_tokens=200,
        max_demonstration_tokens=40,
    )
    return replace(asked, **changes)


@pytest.fixture(scope="module")
def prepared(folder: Path) -> tuple[Path, dict[str, Any]]:
    out = folder / "prepared"
    questions = ["Unrelated?", f"{SHARED.upper()}, twice."]
    return out, prepare(settings(folder), out, {"aime24": questions})


def test_a_prepared_folder_gives_the_questions_that_the_file_itself_gives(
    folder: Path, prepared: tuple[Path, dict[str, Any]]
) -> None:
    asked = settings(folder)
    config = DataConfig(
        tasks=[TaskConfig("chain_sum")],
        train_file=asked.source,
        columns=asked.columns,
        keep_system=False,
        train_questions=250,
        heldout_questions=3,
        max_prompt_tokens=200,
        max_demonstration_tokens=40,
    )
    tokenizer = byte_tokenizer()
    direct = load_questions(config, tokenizer).train
    stored = load_questions(replace(config, train_file=str(prepared[0])), tokenizer).train
    assert isinstance(stored, StoredQuestions) and len(stored) == 250
    for ours, theirs in zip(stored, direct, strict=True):
        assert (ours.prompt, ours.answer, ours.prompt_tokens) == (
            theirs.prompt,
            theirs.answer,
            theirs.prompt_tokens,
        )
        is_cut = len(theirs.demonstration_tokens) == 40
        assert ours.demonstration_tokens == theirs.demonstration_tokens
        assert is_cut or theirs.demonstration_tokens[-1:] in ((), (tokenizer.eos_token_id,))
    bare = sum(not question.demonstration_tokens for question in direct)
    check_complete(QuestionSet(stored, []), graded=True)
    with pytest.raises(ValueError, match=f"{bare} of 250 training questions have no demonstration"):
        check_complete(QuestionSet(stored, []), graded=True, demonstrated=True)


def test_megatrons_reader_and_ours_see_the_same_sequences(prepared: tuple[Path, dict[str, Any]]) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs, ours = IndexedDataset(str(prepared[0] / "tokens")), TokenFile(prepared[0] / "tokens")
    assert len(theirs) == len(ours) == 3 * prepared[1]["questions"]
    assert len(theirs.document_indices) == prepared[1]["questions"] + 1
    for i in range(len(ours)):
        np.testing.assert_array_equal(theirs[i], ours.sequence(i))


def test_the_report_counts_what_was_dropped_cut_missing_and_overlapping(
    prepared: tuple[Path, dict[str, Any]],
) -> None:
    report = prepared[1]
    demonstrations = [f"so {i + 1}" * (1 + i % 13) for i in range(ROWS) if i % 50 != 3 and i not in (7, 9)]
    assert report["rows"] == ROWS and report["questions"] == ROWS - 2
    assert report["dropped"] == {"duplicate": 1, "long prompt": 1}
    assert report["without_demonstration"] == len([i for i in range(ROWS) if i % 50 == 3])
    assert report["truncated_demonstrations"] == sum(len(text) >= 40 for text in demonstrations)
    assert report["tokens"]["demonstration"]["sequences"] == len(demonstrations)
    (found,) = report["overlap"]["aime24"]["list"]
    assert (found["row"], found["question"], len(found["words"].split())) == (5, 1, 13)
    assert json.loads((prepared[0] / "report.json").read_text()) == report


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    folder: Path, prepared: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    prepare(settings(folder, workers=2), tmp_path / "again")
    for name in ("tokens.bin", "tokens.idx", "questions.jsonl", "prepared.json"):
        assert (tmp_path / "again" / name).read_bytes() == (prepared[0] / name).read_bytes(), name


def test_another_prompt_than_the_runs_is_refused(prepared: tuple[Path, dict[str, Any]]) -> None:
    config = DataConfig(
        tasks=[TaskConfig("chain_sum")],
        train_file=str(prepared[0]),
        keep_system=False,
        train_questions=9,
        heldout_questions=3,
    )
    with pytest.raises(ValueError, match="was prepared with another tokenizer, template, instruction"):
        load_questions(replace(config, instruction="Box it."), byte_tokenizer())
    with pytest.raises(ValueError, match=r"has \d+ usable questions, 900 are wanted; lower data\.train_q"):
        load_questions(replace(config, train_questions=900), byte_tokenizer())


def test_a_torn_token_file_is_refused(prepared: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    for name in ("tokens.bin", "tokens.idx"):
        (tmp_path / name).write_bytes((prepared[0] / name).read_bytes())
    (tmp_path / "tokens.bin").write_bytes((prepared[0] / "tokens.bin").read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"tokens.bin has \d+ bytes, its index tells of \d+"):
        TokenFile(tmp_path / "tokens")
    (tmp_path / "tokens.idx").write_bytes(b"no index")
    with pytest.raises(ValueError, match="is no IndexedDataset"):
        TokenFile(tmp_path / "tokens")


def test_nothing_usable_is_an_error_and_leaves_no_folder(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of 301 rows is usable: {.*'long prompt': 300"):
        prepare(settings(folder, max_prompt_tokens=2), tmp_path / "none")
    assert not (tmp_path / "none").exists()
