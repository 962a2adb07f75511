"""Files of one JSON object a line: appended durably, read back, and cut on resume where each has its "step".

What else the records hold is up to those who write them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpt_mega.files import write_atomically

Record = dict[str, Any]


class DamagedFileError(ValueError):
    """A file of a run that does not hold what was written into it; the message names it."""


def append(path: Path, *records: Mapping[str, Any]) -> None:
    """Add the records; once this returns not even a power cut loses them."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_lines(records))
        file.flush()
        os.fsync(file.fileno())


def read(path: Path, *needed: str) -> list[Record]:
    """All records, none where the file is absent.

    A last line without its end is left out: a kill tore it, or the run is writing it now. Raises
    DamagedFileError for any other line that is no JSON object, or lacks a needed key.
    """
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DamagedFileError(
                f"{path}, line {number}: {error}; expected one JSON object a line"
            ) from error
        if not isinstance(record, dict):
            raise DamagedFileError(f"{path}, line {number}: expected a JSON object, got {line[:40]!r}")
        if lacking := [key for key in needed if key not in record]:
            raise DamagedFileError(
                f"{path}, line {number} holds no {', '.join(lacking)}; expected what the run has written"
            )
        records.append(record)
    return records


def read_object(path: Path, *needed: str) -> Record:
    """The JSON object that a file holds. Raises DamagedFileError where it is none, or lacks a needed key."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise DamagedFileError(f"{path}: {error}; expected one JSON object") from error
    if not isinstance(found, dict) or (lacking := [key for key in needed if key not in found]):
        what = f"no {', '.join(lacking)}" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise DamagedFileError(f"{path} holds {what}; expected what the run has written")
    return found


def cut(path: Path, last_step: int) -> None:
    """Leave the records up to `last_step`, or the whole old file where a kill interrupts this."""
    write_atomically(path, _lines([record for record in read(path, "step") if record["step"] <= last_step]))


def _lines(records: Any) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
