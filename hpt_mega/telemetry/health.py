"""Signs that a run is not well: a rank slower than the others, memory that creeps up, a phase that hangs.

What is seen goes to the terminal of rank 0 and to RUN_DIR/health.jsonl, never into the metrics.
"""

from __future__ import annotations

import ctypes
import faulthandler
import resource
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hpt_mega.telemetry import records

SLOW = 1.5  # times the median of the ranks
SLOW_S = 1.0  # and so many seconds above it
WARM_UP = 10  # steps that memory may grow in
USUAL = 1.005  # times the memory then; above it, what is free is given back first
CREEP = 0.10  # growth since then that is worth an alarm
DUMP_AT = 0.9  # of the deadline, so that stacks are there before a rank gives up

Timing = Mapping[str, float]


def watch_for_hangs(deadline_s: float) -> None:
    """From now on, and anew with each call: every thread's stack to stderr shortly before the deadline.

    All ranks that hang then dump theirs, and the process groups' own deadline ends the run after it. The
    timer is a C thread: it also fires where the interpreter is stuck in a library.
    """
    faulthandler.dump_traceback_later(DUMP_AT * deadline_s, file=sys.stderr.fileno())


def stop_watching() -> None:
    faulthandler.cancel_dump_traceback_later()


def stragglers(timings: Sequence[Timing]) -> list[dict[str, Any]]:
    """The slowest rank of each phase that is much slower than the median rank; timings are by rank."""
    found = []
    for phase in sorted({name for timing in timings for name in timing} - {"step"}):
        seconds = [timing.get(phase, 0.0) for timing in timings]
        usual, slowest = statistics.median_low(seconds), max(seconds)
        if slowest > SLOW * usual and slowest - usual > SLOW_S:
            rank = seconds.index(slowest)
            found.append({"phase": phase, "rank": rank, "seconds": slowest, "median": usual})
    return found


def resident_bytes() -> int:
    """Of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def give_back_free_memory() -> None:
    """The C library (glibc) keeps what was freed, in more pieces ever; asked, it returns whole pages."""
    ctypes.CDLL(None).malloc_trim(0)


class Health:
    """Looks at all ranks after each step; every rank calls observe()."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / "health.jsonl"
        self._steps = 0
        self._baseline: list[int] = []
        self._warned = 0.0

    def observe(self, step: int, timing: Timing) -> None:
        memory = resident_bytes()
        if self._baseline and memory > USUAL * self._baseline[dist.get_rank()]:
            give_back_free_memory()
            memory = resident_bytes()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (dict(timing), memory))
        self._steps += 1
        if self._steps == WARM_UP:
            self._baseline = [used for _, used in everyone]
        if dist.get_rank() != 0:
            return
        slow = stragglers([timing for timing, _ in everyone])
        used = [memory for _, memory in everyone]
        records.append(self._path, {"step": step, "rss": used, "stragglers": slow})
        for one in slow:
            print(
                f"step {step}: rank {one['rank']} took {one['seconds']:.1f} s in {one['phase']}, "
                f"the median rank {one['median']:.1f} s",
                flush=True,
            )
        self._alarm(step, used)

    def _alarm(self, step: int, used: Sequence[int]) -> None:
        """Say so once for every further CREEP of growth."""
        if not self._baseline:
            return
        growth = [now / then - 1 for now, then in zip(used, self._baseline, strict=True)]
        if max(growth) > self._warned + CREEP:
            self._warned = max(growth)
            rank = growth.index(self._warned)
            print(
                f"step {step}: the memory of rank {rank} has grown by {self._warned:.0%} since step "
                f"{step - self._steps + WARM_UP}, to {used[rank] / 2**30:.1f} GiB",
                flush=True,
            )
