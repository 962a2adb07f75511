"""What rank 0 shows while a run goes on and when it ends: a progress bar or a line a step, then tables.

What is written to files lives in run.py.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from hpt_mega.telemetry.records import Record
from hpt_mega.telemetry.summary import ACCURACY, STANDARD_ERROR, Summary


class Terminal:
    """The progress of a run of `steps` steps of which `done` are behind it."""

    def __init__(self, steps: int, heldout_questions: int, done: int, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._steps = steps
        self._heldout_questions = heldout_questions
        self._done = done
        self._walls: list[float] = []
        self._started = time.monotonic()
        self._bar: Progress | None = None

    def start(self) -> None:
        if not self._console.file.isatty() or self._console.is_dumb_terminal:
            return
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(min_width=6, ratio=1)),
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            TimeElapsedColumn(),
            console=self._console,
            expand=True,
            refresh_per_second=2,  # the cores are for training
        )
        self._bar.add_task("starting", total=self._steps, completed=self._done)
        self._bar.start()
        self._console.show_cursor(True)  # a killed process could not bring it back

    def resumed(self, step: int | None) -> None:
        """What `resume=auto` came to: the step whose checkpoint is gone on from, None where there is none."""
        nothing = "no checkpoint to go on from: beginning anew"
        self._print(nothing if step is None else f"going on after step {step}")

    def stop(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def evaluated(self, step: int, record: Record) -> None:
        when = "before training" if step == 0 else f"after step {step}"
        self._print(
            f"{when}: {percent(record[ACCURACY])} of {self._heldout_questions} held-out questions "
            f"(± {percent(record[STANDARD_ERROR])})"
        )

    def stepped(self, step: int, record: Record) -> None:
        wall = record["timing"]["step"]
        self._walls.append(wall)
        rate = (record["tokens_rollout"] + record["tokens_trained"]) / wall if wall > 0 else 0.0
        left = duration(statistics.median(self._walls) * (self._steps - step))
        numbers = [f"SFT {percent(record['sft_fraction'], 0)}", f"{rate:,.0f} tok/s"]
        if "reward" in record:  # not where a run takes no rollouts
            numbers = [f"reward {record['reward']:.3f}", f"pass {percent(record['pass_rate'], 0)}", *numbers]
        if self._bar:
            description = "  ".join([*numbers, f"left {left}"])
            self._bar.update(self._bar.task_ids[0], completed=step, description=description, refresh=True)
            return
        elapsed = duration(time.monotonic() - self._started)
        self._print("  ".join([f"step {step}/{self._steps}", *numbers, f"elapsed {elapsed}", f"left {left}"]))

    def warn(self, line: str) -> None:
        self._print(line)

    def finished(self, summary: Summary, report: Path) -> None:
        """The closing tables, and where to read on."""
        self.stop()
        self._console.print(accuracy_table(summary))
        self._console.print(seconds_table(summary))
        rates = summary.tokens_per_s
        self._print(f"tokens/s: {rates['rollout']:,.0f} in rollout, {rates['train']:,.0f} in training")
        self._print(f"report: {report}")
        model = report.parent / "hf"
        if model.is_dir():
            self._print(f"model:  {model}")

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def accuracy_table(summary: Summary) -> Table:
    """Held-out accuracy before and after, overall and by task."""
    table = Table(
        "held-out accuracy", *(Column(name, justify="right") for name in ("before", "after", "change"))
    )
    if summary.initial_accuracy is not None and summary.final_accuracy is not None:
        table.add_row(
            f"all {summary.heldout_questions} questions",
            f"{percent(summary.initial_accuracy)} ± {percent(summary.initial_standard_error or 0.0)}",
            f"{percent(summary.final_accuracy)} ± {percent(summary.final_standard_error or 0.0)}",
            points(summary.final_accuracy - summary.initial_accuracy),
            style="bold",
            end_section=True,
        )
    for task, accuracy in summary.accuracy_by_task.items():
        before, after = accuracy["initial"], accuracy["final"]
        table.add_row(task, percent(before), percent(after), points(after - before))
    return table


def seconds_table(summary: Summary) -> Table:
    """Seconds by phase with their share of the whole run."""
    table = Table("phase", Column("seconds", justify="right"), Column("share", justify="right"))
    for name, seconds, share in summary.phases():
        table.add_row(name, f"{seconds:,.1f}", percent(share, 0), style="bold" if name == "total" else None)
    return table


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def points(difference: float) -> str:
    """A difference of two shares, in percentage points."""
    return f"{100 * difference:+.1f}"


def duration(seconds: float) -> str:
    """3:07 or 1:03:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
