"""Stored tokens through torch's DataLoader and DALI: the same batches, resumed anywhere, on any rank."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from hpt_mega.data.loader import QuestionLoader
from hpt_mega.data.prepare import Settings, prepare
from hpt_mega.data.readers import read_batches
from hpt_mega.data.store import PARTS, StoredQuestions
from tests.data.byte_tokenizer import byte_tokenizer

QUESTIONS = 61


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredQuestions:
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(2)
    lines = [
        json.dumps(
            {"prompt": f"{i}?", "answer": "1", "demonstration": "x" * draw.randint(0, 70), "rejected": "n"}
        )
        for i in range(QUESTIONS)
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    prepare(Settings(str(folder / "rows.jsonl"), str(folder / "tokenizer")), folder / "out")
    return StoredQuestions(folder / "out")


def readers() -> list[str]:
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        return ["torch"]
    return ["torch", "dali"]


def loader(stored: StoredQuestions, reader: str, rank: int = 0, size: int = 1) -> QuestionLoader:
    return QuestionLoader(stored, 4, rank, size, seed=5, reader=reader)


@pytest.mark.parametrize("reader", readers())
def test_a_batch_is_its_documents_padded_with_zeros(stored: StoredQuestions, reader: str) -> None:
    plan = [[3, 0, 60], [7, 8, 8], [1]]
    batches = list(read_batches(stored.file, plan, reader))
    assert len(batches) == len(plan)
    for indices, batch in zip(plan, batches, strict=True):
        for row, index in enumerate(indices):
            parts = [stored.file.sequence(PARTS * index + part) for part in range(PARTS)]
            assert batch.lengths_B3[row].tolist() == [len(part) for part in parts]
            tokens = np.concatenate(parts)
            assert batch.tokens_BS[row].tolist() == [*tokens, *[0] * (batch.tokens_BS.shape[1] - len(tokens))]
        assert batch.tokens_BS.shape[1] == batch.lengths_B3.sum(1).max()
        assert batch.tokens_BS.dtype == batch.lengths_B3.dtype == torch.int32


@pytest.mark.parametrize("reader", readers())
def test_questions_read_ahead_are_those_asked_for_one_by_one_after_any_kill(
    stored: StoredQuestions, reader: str
) -> None:
    expected = [stored[i] for step in range(40) for i in loader(stored, reader).indices(step)]
    for start in random.Random(1).sample(range(30), 20):
        resumed = loader(stored, reader)
        served = [question for step in range(start, start + 5) for question in resumed.next_batch(step)]
        assert served == expected[4 * start : 4 * (start + 5)]


@pytest.mark.parametrize("reader", readers())
@pytest.mark.parametrize("size", [1, 2, 4])
def test_two_epochs_have_every_question_twice_on_any_number_of_ranks(
    stored: StoredQuestions, reader: str, size: int
) -> None:
    ranks = [loader(stored, reader, rank, size) for rank in range(size)]

    def served() -> Iterator[str]:
        for step in range(2 * QUESTIONS // 4 + 1):
            for rank in ranks:
                yield from (question.id for question in rank.next_batch(step))

    ids = list(served())
    for epoch in range(2):
        assert len(set(ids[epoch * QUESTIONS : (epoch + 1) * QUESTIONS])) == QUESTIONS


def test_an_unknown_reader_and_a_missing_dali_are_refused(
    stored: StoredQuestions, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"data.reader is 'tf', expected one of torch, dali"):
        read_batches(stored.file, [[0]], "tf")
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)
    with pytest.raises(ImportError, match=r"pip install 'hpt_mega\[dali\]'"):
        next(read_batches(stored.file, [[0]], "dali"))
