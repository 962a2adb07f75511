"""Questions from JSON lines: prompt and answer, with a demonstration and a rejected response where there are.

Questions that are generated come from questions.py, which also turns text into tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_COLUMNS = {"prompt", "answer", "demonstration", "rejected", "task"}


@dataclass(frozen=True)
class Record:
    """One line of a file; "" where a column is absent."""

    prompt: str
    answer: str = ""
    demonstration: str = ""  # the preferred response of a pair
    rejected: str = ""
    task: str = ""


def read_records(path: Path) -> Iterator[Record]:
    """The lines of a file in order.

    Raises ValueError, naming file and line, for what is no JSON object, an unknown column, a value that is no
    text, or a line without prompt.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _record(line, f"{path}:{number}")


def _record(line: str, where: str) -> Record:
    try:
        columns = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: no JSON ({error}); expected one object a line") from None
    if not isinstance(columns, dict):
        raise ValueError(f"{where}: got {type(columns).__name__}, expected an object with prompt and answer")
    if unknown := columns.keys() - _COLUMNS:
        known = ", ".join(sorted(_COLUMNS))
        raise ValueError(f"{where}: unknown columns {', '.join(sorted(unknown))}; known: {known}")
    if wrong := [name for name, value in columns.items() if not isinstance(value, str)]:
        raise ValueError(f"{where}: {wrong[0]} is {columns[wrong[0]]!r}, expected a text")
    if not columns.get("prompt", "").strip():
        raise ValueError(f"{where}: no prompt")
    return Record(**columns)
