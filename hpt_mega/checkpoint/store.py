"""Where a run's checkpoints live: written aside, renamed when complete, pruned, found again.

What is inside them is megatron/state.py's business.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

_COMPLETE = re.compile(r"step_(\d{6})")


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

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to write the checkpoint of `step` into; it counts once the block ends on all ranks."""
        partial = self.path(step).with_suffix(".partial")
        writer = dist.get_rank() == 0
        if writer:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        yield partial
        dist.barrier()
        if writer:
            shutil.rmtree(self.path(step), ignore_errors=True)
            partial.rename(self.path(step))
            self._prune()

    def _prune(self) -> None:
        for step in self.steps()[: -self._keep]:
            shutil.rmtree(self.path(step))
        for leftover in self._root.glob("*.partial"):
            shutil.rmtree(leftover)
