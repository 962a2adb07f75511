"""Finished runs as a comparison needs them: what each is called, its course, and how often it solved what.

How they are compared is in comparison.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from hpt_mega.config import ConfigError, flattened
from hpt_mega.telemetry.records import DamagedFileError, Record, read, read_object
from hpt_mega.telemetry.summary import holds

OF_A_RUN = ("metrics.jsonl", "summary.json")  # one of them is in the folder of any run that has begun
OF_A_SUMMARY = ("config", "seed", "seconds", "final_accuracy")  # what a comparison reads of it
LABEL, COUNTS = "label.json", "counts.json"
ALGORITHM, GATE = "algorithm.name", "gate."
IMPLIED = ("algorithm.options.", GATE)  # keys that come with an algorithm
REPEATED = ("run_dir", "resume")  # keys in which a run that is made again may differ
PLACE = ("run_dir", "seed", "resume", "model.path")  # keys of the config that are no part of a method


@dataclass(frozen=True)
class Counts:
    """How many of `samples` responses to each question were right, and whether the greedy one was."""

    samples: int
    task: dict[str, str]  # by question
    correct: dict[str, int]
    greedy: dict[str, float]

    @staticmethod
    def load(path: Path) -> Counts | None:
        if not path.is_file():
            return None
        return Counts(**read_object(path, *(field.name for field in fields(Counts))))

    def never_solved(self) -> list[str]:
        return [question for question, count in self.correct.items() if count == 0]


@dataclass(frozen=True)
class Finished:
    """A finished run. Runs of one cell (a model) and seed are paired across methods."""

    method: str
    cell: str
    seed: int
    folder: Path
    records: list[Record]  # of all stages, the steps counted through
    summary: dict[str, Any]
    counts: Counts | None = None
    base: Counts | None = None  # of the model that the run began with
    outside: list[str] = field(default_factory=list)  # tasks that are not trained on
    is_reference: bool = False  # that others are tested against

    def measured(self, key: str) -> list[Record]:
        """The records that hold a metric."""
        return [record for record in self.records if holds(record, key)]


def find(folders: Sequence[Path]) -> list[Finished]:
    """All finished runs in and below the folders.

    Raises ConfigError where there are none, or one of the folders holds not even a begun one;
    DamagedFileError where a file of a run cannot be read, or its metrics.jsonl is gone or empty.
    """
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; expected one of `hpt train`, or of several")
        if len(folders) > 1 and not any(next(folder.rglob(name), None) for name in OF_A_RUN):
            raise ConfigError(f"{folder} holds no run of `hpt train` ({' or '.join(OF_A_RUN)}); leave it out")
    found = sorted({path.parent for folder in folders for path in folder.rglob("summary.json")})
    homes = [home for home in found if not (home.parent / LABEL).is_file()]  # stages are parts
    homes = [home for home in homes if _has_ended(home)]
    if not homes:
        listed = ", ".join(map(str, folders))
        raise ConfigError(
            f"no finished run of `hpt train` (a folder with metrics.jsonl and summary.json) in {listed}"
        )
    summaries = {home: read_object(home / "summary.json", *OF_A_SUMMARY) for home in homes}
    names = _names({home: summary["config"] for home, summary in summaries.items()})
    return [_load(home, summaries[home], names[home]) for home in homes]


def newest(runs: Sequence[Finished]) -> list[Finished]:
    """The runs without those that were made again: copies of a seed are not further seeds."""
    latest: dict[str, Finished] = {}
    for run in sorted(runs, key=lambda run: (run.folder / "summary.json").stat().st_mtime):
        config = {key: str(value) for key, value in flattened(run.summary["config"]) if key not in REPEATED}
        latest[json.dumps([run.method, run.cell, run.seed, config])] = run
    kept = {run.folder for run in latest.values()}
    return [run for run in runs if run.folder in kept]


def comparable(runs: Sequence[Finished]) -> list[Finished]:
    """The runs on models and seeds that every method was run on; all runs where there is no such pair.

    Means over other pairs would compare models, not methods.
    """
    pairs: dict[str, set[tuple[str, int]]] = {}
    for run in runs:
        pairs.setdefault(run.method, set()).add((run.cell, run.seed))
    shared = set.intersection(*pairs.values())
    return [run for run in runs if (run.cell, run.seed) in shared] if shared else list(runs)


def unfinished(folders: Sequence[Path]) -> int:
    """How many runs in and below the folders have begun and not ended."""
    begun = {path.parent for folder in folders for path in folder.rglob("metrics.jsonl")}
    return sum(not _has_ended(home) for home in begun)


def _has_ended(home: Path) -> bool:
    """A lab's run, which has a label, ends with its evaluation."""
    is_evaluated = (home / "eval" / COUNTS).is_file()
    return (home / "summary.json").is_file() and (is_evaluated or not (home / LABEL).is_file())


def alike(runs: Sequence[Finished]) -> list[Finished]:
    """The runs measured in one way: their evaluations count where every run has one."""
    if all(run.counts for run in runs):
        return list(runs)
    return [replace(run, counts=None) for run in runs]


def _load(home: Path, summary: dict[str, Any], name: str) -> Finished:
    stages = [*sorted(home.glob("stage*")), home]
    records = _joined([_records(stage / "metrics.jsonl") for stage in stages])
    common: dict[str, Any] = {"folder": home, "records": records, "summary": summary}
    common |= {"counts": Counts.load(home / "eval" / COUNTS)}
    if not (home / LABEL).is_file():
        model = Path(summary["config"]["model"]["path"])
        return Finished(method=name, cell=model.name, seed=summary["seed"], **common)
    label = read_object(home / LABEL, "base")
    base = Counts.load(home / label.pop("base"))
    return Finished(**label, base=base, **common)


def _records(path: Path) -> list[Record]:
    if found := read(path, "step"):
        return found
    raise DamagedFileError(
        f"{path} is gone or empty; expected a line a step, as the run has ended. Restore it, or move "
        f"{path.parent} away"
    )


def _joined(parts: Sequence[Sequence[Record]]) -> list[Record]:
    """The records of stages one after the other: a later one's step 0 is the former one's last."""
    joined: list[Record] = []
    for records in parts:
        done = joined[-1]["step"] if joined else 0
        joined += [
            record | {"step": record["step"] + done} for record in records if record["step"] or not done
        ]
    return joined


def _names(configs: Mapping[Path, Mapping[str, Any]]) -> dict[Path, str]:
    """What tells the configs of unlabelled runs apart: the algorithm's name where that will do, else also the
    other keys that differ, as KEY=VALUE."""
    flat = {home: dict(flattened(config)) for home, config in configs.items()}
    differing = _differing(list(flat.values()))
    own = [key for key in differing if not key.startswith(IMPLIED)]
    names = {home: _named(one, differing) for home, one in flat.items()}
    for keys in ([ALGORITHM], own, [*own, *(key for key in differing if key.startswith(GATE))]):
        brief = {home: _named(one, keys) for home, one in flat.items()}
        if len(set(brief.values())) == len(set(names.values())):
            return brief
    return names


def unnamed(runs: Sequence[Finished]) -> list[str]:
    """Keys in which unlabelled runs differ though no name says so, but for what comes with an algorithm."""
    configs = [dict(flattened(run.summary["config"])) for run in runs if not (run.folder / LABEL).is_file()]
    named = {part.partition("=")[0] for run in runs for part in run.method.split()}
    return [
        key for key in _differing(configs) if not key.startswith((ALGORITHM, *IMPLIED)) and key not in named
    ]


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = sorted({key for one in configs for key in one if key not in PLACE})
    return [key for key in keys if len({str(one.get(key)) for one in configs}) > 1]


def _named(config: Mapping[str, Any], keys: Sequence[str]) -> str:
    algorithm = str(config[ALGORITHM])
    parts = [algorithm if key == ALGORITHM else f"{key}={config.get(key)}" for key in keys]
    return " ".join(parts) or algorithm
