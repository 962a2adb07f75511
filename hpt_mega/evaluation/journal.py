"""The responses of an evaluation, one JSON line each, kept as they come and read back after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpt_mega.telemetry import records

GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True)
class Graded:
    """What of a response enters the results; its text stays in the file."""

    benchmark: str
    mode: str  # GREEDY or SAMPLED
    question: str  # id
    sample: int
    category: str
    answer: str
    extracted: str  # what was graded, as Verdict.given
    reward: float
    why: str
    tokens: int
    finished: bool

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.benchmark, self.mode, self.question, self.sample


class Journal:
    """The file of responses: append-only, whole lines, each response once.

    Raises ValueError where the file holds a line that no evaluation wrote.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.graded: dict[tuple[str, str, str, int], Graded] = {}
        if path.is_file():
            _drop_torn_line(path)
            for number, line in enumerate(_lines(path), start=1):
                try:
                    row = json.loads(line)
                    row.pop("response")
                    graded = Graded(**row)
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(f"{path}, line {number}: {error}; expected a response") from error
                self.graded[graded.key] = graded

    def is_complete(self, benchmark: str, mode: str, question: str, samples: int) -> bool:
        return all((benchmark, mode, question, i) in self.graded for i in range(samples))

    def add(self, graded: Sequence[tuple[Graded, str]]) -> None:
        """Keep responses and their texts that are not there yet; once this returns a kill loses none."""
        fresh = [(one, text) for one, text in graded if one.key not in self.graded]
        if not fresh:
            return
        lines: list[dict[str, Any]] = [vars(one) | {"response": text} for one, text in fresh]
        records.append(self._path, *lines)
        self.graded |= {one.key: one for one, _ in fresh}


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _drop_torn_line(path: Path) -> None:
    """Cut the file after its last newline: what follows a kill tore off."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - (1 << 16))
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)
