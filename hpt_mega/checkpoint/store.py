"""Where a run's checkpoints live: written aside, summed, renamed when complete, pruned, found again if whole.

What is inside them is megatron/state.py's business. A thread of each rank writes; the training's thread alone
talks with other ranks.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from threading import Thread
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

from hpt_mega.files import sync, sync_tree

SUMS = "sha256.json"  # {file: [bytes, digest]} of a checkpoint's other files
_COMPLETE = re.compile(r"step_(\d{6,})")
_STORAGE_ERRORS = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO))

_ROOM = 2**20  # bytes that must be free for the first small files of a checkpoint

T = TypeVar("T")
Sum = tuple[int, str]  # bytes, digest


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, for a reason that is not the storage's; or none is whole."""


class Writer(Protocol):
    """A state on its way into a folder: megatron/saving.py."""

    def write(self) -> list[Path]:
        """Write this rank's files, and return them; called in another thread."""

    def complete(self) -> None:
        """Add what describes all ranks' files; collective."""


class CheckpointStore:
    """The checkpoints of one run: `RUN_DIR/checkpoints/step_000010/`.

    A folder with that name is complete; one being written is called `step_000010.partial`, and a kill at
    any instant leaves at most that.
    """

    def __init__(self, run_dir: Path, keep: int, deadline_s: float = 600.0) -> None:
        """`deadline_s`: the longest that a rank may write at one checkpoint."""
        self._root = run_dir / "checkpoints"
        self._keep = keep
        self._deadline_s = deadline_s
        self._pending: _Pending | None = None

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        if not self._root.is_dir():
            return []
        matches = (_COMPLETE.fullmatch(entry.name) for entry in self._root.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def latest(self) -> int | None:
        steps = self.steps()
        return steps[-1] if steps else None

    def path(self, step: int) -> Path:
        return self._root / f"step_{step:06d}"

    def latest_whole(self) -> int | None:
        """The newest checkpoint whose files are what was written; all ranks call it, and share the reading.

        None where no checkpoint was written yet. Rank 0 says which newer ones are damaged, and how; they stay
        where they are. Raises CheckpointError, on all ranks, where all are damaged.
        """
        damaged: list[str] = []
        for step in reversed(_from_first_rank(self.steps())):
            damage = [line for part in _gathered(self._damage_of_my_share(step)) for line in part]
            if not damage:
                if damaged and dist.get_rank() == 0:
                    print("\n".join([*damaged, f"going back to that of step {step}"]), flush=True)
                return int(step)
            damaged.append(f"checkpoint {self.path(step)} is damaged: {'; '.join(damage[:4])}")
        if damaged:
            lines = "\n".join(damaged)
            raise CheckpointError(
                f"there is no whole checkpoint to go on from:\n{lines}\nA run from the start would "
                "empty its metrics and samples: restore one of them, or ask for that with resume=never "
                "(another run_dir keeps them)"
            )
        return None

    def begin(self, step: int, make: Callable[[Path], Writer]) -> None:
        """Begin the checkpoint of `step` in a new folder; settle() completes it. All ranks call both.

        Waits for the checkpoint before it, if that is not complete yet.
        """
        self.settle()
        partial = self._partial(step)
        failure = _from_first_rank(_prepare(partial) if dist.get_rank() == 0 else "")
        if failure:
            self._give_up(step, failure)
        else:
            self._pending = _Pending(step, make(partial))

    def settle(self, *, wait: bool = True) -> None:
        """Complete the checkpoint that was begun, if any; without `wait` only if all ranks have written.

        Where storage failed on any rank (full, over quota, broken) the run goes on without this checkpoint:
        rank 0 says so, and the last good one stays. Raises CheckpointError, on all ranks and with the one
        that failed, for anything else.
        """
        if (pending := self._pending) is None or not (wait or all(_gathered(pending.has_written()))):
            return
        self._pending = None
        step, outcomes = pending.step, _gathered(pending.outcome(self._deadline_s))
        failures = {rank: error for rank, (error, _) in enumerate(outcomes) if error}
        for rank, error in failures.items():
            if not _is_of_storage(error):
                raise CheckpointError(f"rank {rank} could not write the checkpoint of step {step}: {error}")
        if failures:
            self._give_up(step, next(iter(failures.values())))
            return
        pending.writer.complete()
        failure = (
            self._complete(step, _merged([sums for _, sums in outcomes])) if dist.get_rank() == 0 else ""
        )
        if failure := _from_first_rank(failure):
            self._give_up(step, failure)

    def prune(self, keep: int) -> list[int]:
        """Remove all but the newest `keep`; returns the steps removed."""
        removed = self.steps()[:-keep]
        for step in removed:
            shutil.rmtree(self.path(step))
        return removed

    def set_aside(self, after: int) -> None:
        """Rename checkpoints of later steps than `after`, on rank 0: damaged ones, or another run's, which
        would count as newer than those to come."""
        if dist.get_rank() == 0:
            for step in [step for step in self.steps() if step > after]:
                aside = self.path(step).with_suffix(".aside")
                shutil.rmtree(aside, ignore_errors=True)
                self.path(step).rename(aside)
                print(f"checkpoint {self.path(step)} is {aside.name} now", flush=True)

    def aside(self) -> list[Path]:
        """What set_aside() renamed."""
        return sorted(self._root.glob("*.aside"))

    def _partial(self, step: int) -> Path:
        return self.path(step).with_suffix(".partial")

    def _complete(self, step: int, sums: dict[str, Sum]) -> str:
        """Sum what is left, sync, rename, prune, on rank 0; returns what storage had against it."""
        partial = self._partial(step)
        try:
            sums |= _sums(partial, (path for path in partial.rglob("*") if path.is_file()), known=sums)
            (partial / SUMS).write_text(json.dumps(sums, indent=1, sort_keys=True))
            sync_tree(partial)
            shutil.rmtree(self.path(step), ignore_errors=True)
            partial.rename(self.path(step))
            sync(self._root)
            self.prune(self._keep)
            for leftover in self._root.glob("*.partial"):  # by kills
                shutil.rmtree(leftover)
        except OSError as error:
            return str(error)
        return ""

    def _give_up(self, step: int, failure: str) -> None:
        """Go on without the checkpoint of this step; all ranks know why."""
        if dist.get_rank() == 0:
            shutil.rmtree(self._partial(step), ignore_errors=True)
            print(f"the checkpoint of step {step} was not written: {failure}", flush=True)
            print(f"going on; the last good one is that of step {self.latest()}", flush=True)

    def _damage_of_my_share(self, step: int) -> list[str]:
        return damage(self.path(step), share=(dist.get_rank(), dist.get_world_size()))


class _Pending:
    """A checkpoint that a thread of this rank is writing."""

    def __init__(self, step: int, writer: Writer) -> None:
        self.step = step
        self.writer = writer
        self._error = ""
        self._sums: dict[str, Sum] = {}
        self._thread = Thread(target=self._write, name=f"checkpoint of step {step}", daemon=True)
        self._thread.start()

    def has_written(self) -> bool:
        return not self._thread.is_alive()

    def outcome(self, deadline_s: float) -> tuple[str, dict[str, Sum]]:
        """What went wrong on this rank, or nothing, and the sums of its files; waits for the thread."""
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            return f"not done after {deadline_s:g} s; raise trainer.deadline_s", {}
        return self._error, self._sums

    def _write(self) -> None:
        try:
            files = self.writer.write()
            self._sums = _sums(files[0].parent, files) if files else {}
        except BaseException as error:
            self._error = f"{type(error).__name__}: {error}"


def damage(folder: Path, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint's files; (rank, size) leaves the others to other processes."""
    file = folder / SUMS
    try:
        expected = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        return [f"{SUMS}: {error}"] if share[0] == 0 else []
    found = []
    for name in sorted(expected)[share[0] :: share[1]]:
        size, digest = expected[name]
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size} bytes, {size} were written")
        elif _digest(path) != digest:
            found.append(f"{name} holds other bytes than were written")
    return found


def _prepare(partial: Path) -> str:
    """An empty folder with room in it; returns what storage has against it.

    Rank 0 alone writes the first files, among the calls in which all ranks meet: there it could not fail
    without the others waiting for it.
    """
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "room").write_bytes(bytes(_ROOM))
        (partial / "room").unlink()
    except OSError as error:
        return str(error)
    return ""


def _sums(folder: Path, files: Iterable[Path], known: Collection[str] = ()) -> dict[str, Sum]:
    named = {str(path.relative_to(folder)): path for path in files}
    return {name: (path.stat().st_size, _digest(path)) for name, path in named.items() if name not in known}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_of_storage(error: str) -> bool:
    return any(reason in error for reason in _STORAGE_ERRORS)


def _merged(parts: Sequence[Mapping[str, T]]) -> dict[str, T]:
    return {name: value for part in parts for name, value in part.items()}


def _gathered(value: T) -> list[T]:
    """Every rank's value, on all of them."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def _from_first_rank(value: T) -> T:
    """Rank 0's view of the folder: another node's may lag behind."""
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
