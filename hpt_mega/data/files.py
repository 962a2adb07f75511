"""Rows of JSON lines, JSON, parquet and Hugging Face datasets as records: prompt, answer, demonstration.

Questions that are generated come from questions.py, which also turns text into tokens.
"""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from hpt_mega.config import ColumnsConfig

HUB = "hf:"  # before the name of a dataset: hf:OWNER/NAME or hf:OWNER/NAME:CONFIG
LETTERS = "ABCDEFGHIJ"
BATCH_ROWS = 256  # of a parquet file at a time: long demonstrations make rows of 30 kB

Row = Mapping[str, Any]
Message = tuple[str, str]  # role, content


@dataclass(frozen=True)
class Record:
    """One row; "" where there is nothing. `earlier` are the messages before the prompt, a system one too."""

    prompt: str
    answer: str = ""
    demonstration: str = ""
    rejected: str = ""
    task: str = ""
    earlier: tuple[Message, ...] = ()


def is_data(source: str) -> bool:
    """Whether a text names a dataset of the hub or a file of a known kind, existing or not."""
    return source.startswith(HUB) or Path(source).suffix in _READERS


def read_records(
    source: str | Path, columns: ColumnsConfig | None = None, split: str = "train"
) -> Iterator[Record]:
    """The rows of a file (.jsonl, .json, .parquet) or of a dataset (hf:OWNER/NAME) in order.

    Raises ValueError that names the file and the row where a column is absent, misspelt or of the wrong
    type; ImportError, naming what to install, where the reader's package is not there.
    """
    columns = columns or ColumnsConfig()
    rows = _read_rows(str(source), split)
    first = next(rows, None)
    if first is None:
        return
    _check_columns(first, columns)
    for where, row in chain([first], rows):
        try:
            yield _record(row, columns)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _read_rows(source: str, split: str) -> Iterator[tuple[str, Row]]:
    """(where, row): what an error names, and the row's columns."""
    if source.startswith(HUB):
        yield from _hub_rows(source, split)
        return
    path = Path(source)
    if path.suffix not in _READERS:
        raise ValueError(f"{source}: expected a file {', '.join(_READERS)}, or {HUB}OWNER/NAME")
    for number, row in _READERS[path.suffix](path):
        if not isinstance(row, dict):
            got = type(row).__name__
            raise ValueError(f"{path}:{number}: got {got}, expected an object with prompt and answer")
        yield f"{path}:{number}", row


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _parsed(line, f"{path}:{number}", "one object a line")


def _json_list(path: Path) -> Iterator[tuple[int, Any]]:
    rows = _parsed(path.read_bytes(), str(path), "a list of objects")
    if not isinstance(rows, list):
        raise ValueError(f"{path}: got {type(rows).__name__}, expected a list of objects")
    yield from enumerate(rows, start=1)


def _parsed(text: bytes, where: str, expected: str) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not in UTF-8 ({error}); save the file in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error}); expected {expected}") from None


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    parquet = _optional("pyarrow.parquet", str(path))
    number = 0
    with parquet.ParquetFile(path, memory_map=True) as file:
        for batch in file.iter_batches(BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row


def _hub_rows(source: str, split: str) -> Iterator[tuple[str, Row]]:
    datasets = _optional("datasets", source)
    name, _, config = source.removeprefix(HUB).partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub raises of its own and of the network's kinds
        raise ValueError(
            f"{source}, split {split}: {type(error).__name__}: {error}. Without a network, download it "
            "elsewhere and name the file"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield f"{source}:{number}", row


def _optional(module: str, source: str) -> Any:
    """A module of the extra `data`. Raises ImportError that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{source} needs {error.name}: pip install 'hpt_mega[data]'") from error


_DEFAULTS = {part.name: part.default for part in fields(ColumnsConfig) if isinstance(part.default, str)}
_READERS = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}


def _check_columns(first: tuple[str, Row], columns: ColumnsConfig) -> None:
    """Refuse what looks like a misspelt default name: absent, while the row has one of nearly its name."""
    where, row = first
    wanted = {name for name in vars(columns).values() if isinstance(name, str) and name}
    spare = [given for given in row if given not in wanted]
    for name in sorted(wanted & set(_DEFAULTS.values())):
        near = difflib.get_close_matches(name, spare, 1, cutoff=0.8)
        if name not in row and near:
            raise ValueError(f"{where}: column {near[0]} is not known; did you mean {name}?")


def _record(row: Row, columns: ColumnsConfig) -> Record:
    earlier, prompt, ending = _conversation(_column(row, columns, "prompt"), columns.prompt)
    answer = _text(_column(row, columns, "answer"), columns.answer)
    if columns.choices:
        prompt = f"{prompt}\n\n{_lettered(*_choices(_column(row, columns, 'choices'), columns.choices))}"
    elif columns.incorrect:
        wrong = [_text(_reach(row, name), name) for name in columns.incorrect]
        prompt, answer = _shuffled(prompt, answer, wrong)
    if not prompt.strip():
        raise ValueError(f"no {columns.prompt}; the row has {', '.join(sorted(row))}")
    return Record(
        prompt=prompt,
        answer=answer,
        demonstration=_response(_column(row, columns, "demonstration"), columns.demonstration) or ending,
        rejected=_response(_column(row, columns, "rejected"), columns.rejected),
        task=_text(_column(row, columns, "task"), columns.task),
        earlier=earlier,
    )


def _column(row: Row, columns: ColumnsConfig, name: str) -> Any:
    """The value of a mapped column, None where one of a default name is absent. Raises ValueError."""
    column = getattr(columns, name)
    if not column:
        return None
    found = _reach(row, column)
    if found is None and column != _DEFAULTS[name] and column.partition(".")[0] not in row:
        raise ValueError(f"no column {column} for {name}; the row has {', '.join(sorted(row))}")
    return found


def _reach(row: Row, column: str) -> Any:
    value: Any = row.get(column)
    if value is None and "." in column:
        value = row
        for part in column.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    return value


def _text(value: Any, column: str) -> str:
    """A text or number as text; of a list of them (several answers) all, joined by commas."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and all(isinstance(part, str | int | float) for part in value):
        return ", ".join(map(str, value))
    raise ValueError(f"{column} is {json.dumps(value, default=str)[:60]}, expected a text")


def _messages(value: Any, column: str) -> list[Message]:
    wrong = [m for m in value if not (isinstance(m, dict) and isinstance(m.get("content"), str))]
    if wrong:
        given = json.dumps(wrong[0], default=str)[:60]
        raise ValueError(f"{column} holds {given}, expected messages with role and content")
    return [(str(message.get("role", "user")), message["content"]) for message in value]


def _conversation(value: Any, column: str) -> tuple[tuple[Message, ...], str, str]:
    """(messages before the prompt, the prompt, the reply that ends a whole conversation, else "")."""
    if value is None:
        return (), "", ""
    if not isinstance(value, list):
        return (), _text(value, column), ""
    messages = _messages(value, column)
    reply = messages.pop()[1] if messages and messages[-1][0] == "assistant" else ""
    if not messages or messages[-1][0] != "user":
        roles = ", ".join(role for role, _ in messages) or "none"
        raise ValueError(f"{column} has messages of {roles}; expected the user's before the response")
    return tuple(messages[:-1]), messages[-1][1], reply


def _response(value: Any, column: str) -> str:
    """A response given as text or as messages, whose last one it is."""
    if isinstance(value, list):
        messages = _messages(value, column)
        return messages[-1][1] if messages else ""
    return _text(value, column)


def _choices(value: Any, column: str) -> tuple[Sequence[str], Sequence[str]]:
    """(letters, texts) of a multiple-choice question."""
    texts = value.get("text") if isinstance(value, dict) else value
    labels = value.get("label") if isinstance(value, dict) else None
    if not isinstance(texts, list) or not 2 <= len(texts) <= len(LETTERS):
        given = json.dumps(value, default=str)[:60]
        raise ValueError(f"{column} is {given}, expected 2 to {len(LETTERS)} choices")
    return labels or LETTERS[: len(texts)], [str(text) for text in texts]


def _lettered(letters: Sequence[str], texts: Sequence[str]) -> str:
    return "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True))


def _shuffled(prompt: str, answer: str, wrong: Sequence[str]) -> tuple[str, str]:
    """The prompt with its choices in an order that the question's text alone decides, and the letter."""
    choices = [answer, *wrong]
    random.Random(prompt).shuffle(choices)
    letters = LETTERS[: len(choices)]
    return f"{prompt}\n\n{_lettered(letters, choices)}", letters[choices.index(answer)]
