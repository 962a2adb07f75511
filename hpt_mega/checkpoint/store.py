"""Where a run's checkpoints live: written aside, summed, renamed when complete, pruned, found again if whole.

What is inside them is megatron/state.py's business.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

SUMS = "sha256.json"  # {file: [bytes, digest]} of a checkpoint's other files
_COMPLETE = re.compile(r"step_(\d{6,})")
_STORAGE_ERRORS = tuple(os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO))

T = TypeVar("T")


class CheckpointStore:
    """The checkpoints of one run: `RUN_DIR/checkpoints/step_000010/`.

    A folder with that name is complete; one being written is called `step_000010.partial`, and a kill at
    any instant leaves at most that.
    """

    def __init__(self, run_dir: Path, keep: int) -> None:
        self._root = run_dir / "checkpoints"
        self._keep = keep

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

        Rank 0 says which newer ones are damaged, and how; they stay where they are.
        """
        for step in reversed(_from_first_rank(self.steps())):
            damage = [line for part in _gathered(self._damage_of_my_share(step)) for line in part]
            if not damage:
                return int(step)
            if dist.get_rank() == 0:
                print(f"checkpoint {self.path(step)} is damaged: {'; '.join(damage[:4])}", flush=True)
                print("going back to the one before it", flush=True)
        return None

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to write the checkpoint of `step` into; it counts once the block ends on all ranks.

        Where storage fails on any rank (full, over quota, broken) the run goes on without this checkpoint:
        rank 0 says so, and the last good one stays. Other errors pass through.
        """
        partial = self.path(step).with_suffix(".partial")
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        failure = ""
        try:
            yield partial
        except (OSError, RuntimeError, CheckpointException) as error:
            failure = _storage_failure(error)
            if not failure:
                raise
        failures = [one for one in _gathered(failure) if one]
        sums = {} if failures else _merged(_gathered(_sums(_share(_files(partial)), partial)))
        if dist.get_rank() == 0:
            failures += [] if failures else self._complete(step, sums)
            if failures:
                shutil.rmtree(partial, ignore_errors=True)
                last = self.latest()
                print(f"the checkpoint of step {step} was not written: {failures[0]}", flush=True)
                print(f"going on; the last good one is that of step {last}", flush=True)
        dist.barrier()

    def prune(self, keep: int) -> list[int]:
        """Remove all but the newest `keep`, and what kills have left; returns the steps removed."""
        removed = self.steps()[:-keep]
        for step in removed:
            shutil.rmtree(self.path(step))
        for leftover in self._root.glob("*.partial"):
            shutil.rmtree(leftover)
        return removed

    def _complete(self, step: int, sums: Mapping[str, Sequence[Any]]) -> list[str]:
        """Sum, rename, prune, on rank 0; returns what storage had against it."""
        partial = self.path(step).with_suffix(".partial")
        try:
            (partial / SUMS).write_text(json.dumps(sums, indent=1, sort_keys=True))
            shutil.rmtree(self.path(step), ignore_errors=True)
            partial.rename(self.path(step))
            self.prune(self._keep)
        except OSError as error:
            return [str(error)]
        return []

    def _damage_of_my_share(self, step: int) -> list[str]:
        return damage(self.path(step), share=(dist.get_rank(), dist.get_world_size()))


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


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _share(items: Sequence[T]) -> Sequence[T]:
    return items[dist.get_rank() :: dist.get_world_size()]


def _sums(names: Sequence[str], folder: Path) -> dict[str, tuple[int, str]]:
    return {name: ((folder / name).stat().st_size, _digest(folder / name)) for name in names}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _storage_failure(error: BaseException) -> str:
    """What the error says where storage caused it, on this rank or another; else empty."""
    text = f"{error!r} {error}"
    return next((reason for reason in _STORAGE_ERRORS if reason in text), "")


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
