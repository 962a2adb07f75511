"""A folder that appears only when complete, and whose making goes on where it was killed.

What is written into it, and what a step of the work is, is the caller's business.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from hpt_mega.checkpoint.workers import LostWorkerError
from hpt_mega.files import sync, sync_tree

_FILE = ".journal.jsonl"


class Journal:
    """The steps done, with what each left to be known: one line of JSON a step, flushed when it is done."""

    def __init__(self, file: TextIO, done: dict[str, Any]) -> None:
        self._file = file
        self.done = done

    def add(self, step: str, record: Any) -> None:
        self._file.write(json.dumps([step, record]) + "\n")
        self._file.flush()
        self.done[step] = record


@contextmanager
def resumable_folder(out: Path, request: Any) -> Iterator[tuple[Path, Journal]]:
    """The folder to fill beside `out`, and the journal of an earlier attempt at the same request.

    The folder takes the name `out` once the block ends. An error takes it away; a kill, of a worker too,
    leaves it for the next attempt. Raises FileExistsError where `out` is there already, or where another
    process fills it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} is there already; remove it or choose another --out")
    aside = out.absolute().with_name(f".{out.name}.partial")
    aside.mkdir(parents=True, exist_ok=True)
    with (aside / _FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{aside} is being filled by another process; wait for it") from None
        journal = _reopen(file, aside, request)
        try:
            yield aside, journal
            _become(aside, out)
        except LostWorkerError:
            raise
        except Exception:
            shutil.rmtree(aside, ignore_errors=True)
            raise


def _reopen(file: TextIO, aside: Path, request: Any) -> Journal:
    file.seek(0)
    lines = file.readlines()
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # killed while writing it
    wanted = json.dumps(request)
    if not lines or lines[0] != wanted + "\n":
        for path in aside.iterdir():
            if path.name != _FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        lines = [wanted + "\n"]
    file.truncate(0)
    file.writelines(lines)
    file.flush()
    return Journal(file, dict(json.loads(line) for line in lines[1:]))


def _become(aside: Path, out: Path) -> None:
    (aside / _FILE).unlink()
    if out.exists():
        out.rmdir()  # an empty folder that stood there before
    sync_tree(aside)
    aside.rename(out)
    sync(out.absolute().parent)
