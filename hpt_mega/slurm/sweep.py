"""Sweeps: the jobs that swept overrides stand for, and which of them did not finish."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from hpt_mega.arguments import quoted
from hpt_mega.config import ConfigError, compose
from hpt_mega.files import write_atomically

JOBS = "jobs.jsonl"
# a value's characters, but that what a backslash or quotes protect is one
_PARTS = re.compile(r"""\\.|'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|.""", re.DOTALL)


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of values with commas, as Hydra's --multirun; brackets and quotes hold one value."""
    swept = []
    for override in overrides:
        key, equals, values = override.partition("=")
        if not equals:
            raise ConfigError(f"got {override!r}, expected KEY=VALUE or KEY=VALUE,VALUE")
        swept.append([f"{key}={value}" for value in _split(values)])
    return [list(combination) for combination in itertools.product(*swept)]


def _split(values: str) -> list[str]:
    """At the commas outside all brackets and quotes."""
    parts, depth = [""], 0
    for part in _PARTS.findall(values):
        depth += (part in "[{(") - (part in "]})")
        if part == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += part
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
    """The overrides of a job, with a run_dir of its own. Raises ConfigError where there is no such job."""
    jobs = _jobs(folder)
    if not 0 <= index < len(jobs):
        raise ConfigError(
            f"got job {index} of {folder / JOBS}, expected 0 to {len(jobs) - 1}; submit the sweep anew"
        )
    return [*jobs[index], f"run_dir={quoted(f'{folder}/{index}')}"]


def unfinished(folder: Path) -> list[str]:
    """The jobs of a sweep that left no summary, each by its overrides and its run's folder."""
    return [
        f"{' '.join(job)} ({folder}/{index})"
        for index, job in enumerate(_jobs(folder))
        if not (folder / str(index) / "summary.json").is_file()
    ]


def _jobs(folder: Path) -> list[list[str]]:
    try:
        lines = (folder / JOBS).read_text().splitlines()
    except OSError as error:
        raise ConfigError(
            f"cannot read {folder / JOBS}: {error.strerror}; expected the folder of a sweep, which "
            "`bash slurm/ablation.sh FOLDER KEY=VALUE,VALUE...` makes"
        ) from error
    return [json.loads(line) for line in lines]
