"""Batches of trajectories in a file, to be trained on again: under another layout, precision or algorithm.

One JSON object a line, with the step it belongs to; numbers come back with the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from hpt_mega.trajectory import Source, Trajectory


def append_batch(path: Path, step: int, trajectories: Sequence[Trajectory]) -> None:
    """Add the trajectories of one step, of all replicas; a new file at step 1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w" if step == 1 else "a") as file:
        for trajectory in trajectories:
            file.write(json.dumps({"step": step, **asdict(trajectory)}) + "\n")


def read_batches(path: Path) -> dict[int, list[Trajectory]]:
    """What append_batch wrote, by step. Raises ValueError, naming the line, for anything else."""
    batches: dict[int, list[Trajectory]] = {}
    with path.open() as file:
        for number, line in enumerate(file, start=1):
            try:
                given = json.loads(line)
                step = int(given.pop("step"))
                given |= {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
                trajectory = Trajectory(**given | {"source": Source(given["source"])})
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{path}, line {number}: no trajectory of debug.save ({error})") from error
            batches.setdefault(step, []).append(trajectory)
    return batches
