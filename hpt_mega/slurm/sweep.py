"""Sweeps: the jobs that swept overrides stand for, and which of them did not finish."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

from hpt_mega.config import ConfigError, compose
from hpt_mega.files import write_atomically

JOBS = "jobs.jsonl"


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of values with commas, as Hydra's --multirun; what brackets hold is one value."""
    swept = []
    for override in overrides:
        key, equals, values = override.partition("=")
        if not equals:
            raise ConfigError(f"got {override!r}, expected KEY=VALUE or KEY=VALUE,VALUE")
        swept.append([f"{key}={value}" for value in _split(values)])
    return [list(combination) for combination in itertools.product(*swept)]


def _split(values: str) -> list[str]:
    """At the commas outside all brackets."""
    parts, depth = [""], 0
    for character in values:
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def composed(overrides: Sequence[str]) -> list[list[str]]:
    """The jobs of a sweep; each is composed, to find misspelt keys here."""
    jobs = expand(overrides)
    for job in jobs:
        compose(job)
    return jobs


def write_jobs(folder: Path, jobs: Sequence[Sequence[str]]) -> None:
    """Write the jobs of a sweep. Raises ConfigError where the folder holds another one."""
    file, text = folder / JOBS, "".join(json.dumps(job) + "\n" for job in jobs)
    if file.is_file() and file.read_text() != text:
        raise ConfigError(
            f"{folder} holds another sweep, whose jobs may still read {file}; choose another folder, or "
            "remove this one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text)


def read_job(folder: Path, index: int) -> list[str]:
    """The overrides of a job, with a run_dir of its own."""
    return [*_jobs(folder)[index], f"run_dir={folder}/{index}"]


def unfinished(folder: Path) -> list[str]:
    """The jobs of a sweep that left no summary, each by its overrides and its run's folder."""
    return [
        f"{' '.join(job)} ({folder}/{index})"
        for index, job in enumerate(_jobs(folder))
        if not (folder / str(index) / "summary.json").is_file()
    ]


def _jobs(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / JOBS).read_text().splitlines()]
