"""The verb `hpt grade`: its options, the file streamed through the grader, and how its errors reach the user.

The grader itself is pool.py.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from hpt_mega.arguments import at_least, seconds
from hpt_mega.ending import FAILED
from hpt_mega.files import writing_file
from hpt_mega.rewards.pool import KINDS, MEMORY_MIB, RewardPool

LEAST_MIB = 256  # of address space: with less a worker has none left beside its libraries
CHUNK_LINES = 512  # graded at a time: bounds memory, and keeps all workers busy
LINE_BYTES = 64 << 20

Item = tuple[str, str, str]  # response, answer, kind


def add_grade_options(verb: argparse.ArgumentParser) -> None:
    """Give the verb's parser its options."""
    verb.add_argument("--file", type=Path, required=True, metavar="IN", help="JSON lines to grade")
    verb.add_argument("--out", type=Path, required=True, metavar="OUT", help="JSON lines, in the same order")
    verb.add_argument(
        "--workers", type=at_least(1), default=os.cpu_count() or 1, metavar="N", help="processes"
    )
    verb.add_argument("--deadline", type=seconds, default=5.0, metavar="S", help="seconds for an answer (5)")
    verb.add_argument(
        "--memory-mib",
        type=at_least(LEAST_MIB),
        default=MEMORY_MIB,
        metavar="M",
        help=f"of each process, {LEAST_MIB} or above ({MEMORY_MIB})",
    )
    verb.set_defaults(run=_grade)


def _grade(options: argparse.Namespace) -> int:
    started = time.monotonic()
    try:
        count, right = grade_file(
            options.file, options.out, options.workers, options.deadline, options.memory_mib
        )
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    took = time.monotonic() - started
    print(f"{options.out}: {right} of {count} right, {took:.1f} s ({count / took:.0f} a second)")
    return 0


def grade_file(
    source: Path, out: Path, workers: int = 1, deadline_s: float = 5.0, memory_mib: int = MEMORY_MIB
) -> tuple[int, int]:
    """Grade each line {"answer", "response", "kind"} of a file; returns how many there are, and are right.

    out is whole or absent. Raises ValueError that names the line of an
    unfit input, OSError.
    """
    count = right = 0
    with (
        RewardPool(workers=workers, deadline_s=deadline_s, memory_mib=memory_mib) as pool,
        open(source, "rb") as lines,
        writing_file(out) as written,
        _bar(source) as advance,
    ):
        items = _items(lines, source)
        while chunk := list(islice(items, CHUNK_LINES)):
            responses, answers, kinds = zip(*chunk, strict=True)
            for verdict in pool.verdicts(responses, answers, kinds):
                written.write(json.dumps({"reward": int(verdict.reward), "why": verdict.why}) + "\n")
                right += int(verdict.reward)
            count += len(chunk)
            advance(lines.tell())
    return count, right


def _items(lines: BinaryIO, source: Path) -> Iterator[Item]:
    for number, line in enumerate(iter(lambda: lines.readline(LINE_BYTES + 1), b""), 1):
        if len(line) > LINE_BYTES:
            raise ValueError(f"{source}, line {number}: longer than {LINE_BYTES >> 20} MiB")
        try:
            yield _item(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{source}, line {number}: {error}") from error


def _item(line: bytes) -> Item:
    """One line's response, gold answer and kind; kind is math where none is given."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg}, column {error.colno})") from error
    if not isinstance(row, dict) or not isinstance(row.get("response"), str):
        raise ValueError('expected {"answer": ..., "response": "...", "kind": ...}')
    answer, kind = row.get("answer"), row.get("kind", "math")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"answer is {json.dumps(answer)[:40]}, expected a text or a number")
    if kind not in KINDS:
        raise ValueError(f"kind is {json.dumps(kind)[:40]}, expected one of {', '.join(KINDS)}")
    return row["response"], str(answer), kind


@contextmanager
def _bar(source: Path) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("grading", total=source.stat().st_size or None)
        yield lambda done: bar.update(task, completed=done)
