"""A run in numbers, summary.json: accuracy before and after, seconds, tokens, and what made it.

How it is shown lives in terminal.py and report.py.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hpt_mega.config import Config
from hpt_mega.files import write_atomically
from hpt_mega.telemetry.records import Record, read_object

PHASES = ("rollout", "reward", "train", "sync", "eval", "checkpoint")
ACCURACY = "eval/accuracy"
STANDARD_ERROR = "eval/standard_error"


@dataclass(frozen=True)
class Summary:
    """The fields of summary.json; the accuracies are None where nothing was evaluated yet."""

    initial_accuracy: float | None
    initial_standard_error: float | None
    final_accuracy: float | None
    final_standard_error: float | None
    heldout_questions: int
    accuracy_by_task: dict[str, dict[str, float]]  # task: {"initial", "final"}
    steps: int
    tokens: dict[str, int]  # rollout, trained
    seconds: dict[str, float]  # by phase, and "total"
    tokens_per_s: dict[str, float]  # rollout, train: within the phase of that name
    sft_fraction: list[float]  # by step
    policy_version: int
    seed: int
    world_size: int
    config: dict[str, Any]
    versions: dict[str, str]

    @property
    def gain(self) -> float | None:
        """Accuracy after minus before."""
        if self.initial_accuracy is None or self.final_accuracy is None:
            return None
        return self.final_accuracy - self.initial_accuracy

    @property
    def gain_in_standard_errors(self) -> float | None:
        """The gain over the standard error of a difference of two independent proportions; both evaluations
        ask the same questions, so that it is surer than this says."""
        error = math.hypot(self.initial_standard_error or 0.0, self.final_standard_error or 0.0)
        return self.gain / error if self.gain is not None and error > 0 else None

    def phases(self) -> list[tuple[str, float, float]]:
        """Phase, seconds, share of the total; "other" is what lies between the phases."""
        total = self.seconds["total"]
        spent = {
            phase: seconds for phase, seconds in self.seconds.items() if phase != "total" and seconds > 0
        }
        spent["other"] = max(0.0, total - sum(spent.values()))
        spent["total"] = total
        return [(phase, seconds, seconds / total if total > 0 else 0.0) for phase, seconds in spent.items()]

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(path: Path) -> Summary:
        """Raises DamagedFileError where the file is no summary."""
        found = read_object(path, *(field.name for field in fields(Summary)))
        return Summary(**{field.name: found[field.name] for field in fields(Summary)})


def holds(record: Record, metric: str) -> bool:
    """Whether the step measured it: the entropy is that of trained tokens, of which a step may have none."""
    return metric in record and (metric != "entropy" or bool(record.get("tokens_trained")))


def summarise(records: Sequence[Record], cfg: Config, timing: Mapping[str, float] | None = None) -> Summary:
    """The summary of a run from its metrics.jsonl; `timing` was taken after the last of the records."""
    evaluations = [record for record in records if ACCURACY in record]
    first, last = (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
    steps = [record for record in records if record["step"] > 0]
    seconds = _seconds([record.get("timing", {}) for record in records] + [timing or {}])
    tokens = {
        "rollout": round(sum(record["tokens_rollout"] for record in steps)),
        "trained": round(sum(record["tokens_trained"] for record in steps)),
    }
    return Summary(
        initial_accuracy=first.get(ACCURACY),
        initial_standard_error=first.get(STANDARD_ERROR),
        final_accuracy=last.get(ACCURACY),
        final_standard_error=last.get(STANDARD_ERROR),
        heldout_questions=cfg.data.heldout_questions,
        accuracy_by_task=_by_task(first, last),
        steps=len(steps),
        tokens=tokens,
        seconds=seconds,
        tokens_per_s={
            "rollout": _rate(tokens["rollout"], seconds["rollout"]),
            "train": _rate(tokens["trained"], seconds["train"]),
        },
        sft_fraction=[record["sft_fraction"] for record in steps],
        policy_version=round(steps[-1]["policy_version"]) if steps else 0,
        seed=cfg.seed,
        world_size=cfg.parallel.world_size,
        config=asdict(cfg),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """What this process runs on."""
    packages = ("torch", "megatron-core", "transformers", "hpt_mega")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _by_task(first: Record, last: Record) -> dict[str, dict[str, float]]:
    tasks = [key for key in first if key.startswith(f"{ACCURACY}/")]
    return {key.removeprefix(f"{ACCURACY}/"): {"initial": first[key], "final": last[key]} for key in tasks}


def _seconds(timings: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total = dict.fromkeys((*PHASES, "step"), 0.0)
    for timing in timings:
        for phase, seconds in timing.items():
            total[phase] = total.get(phase, 0.0) + seconds
    wall = total.pop("step")
    return total | {"total": wall}


def _rate(tokens: float, seconds: float) -> float:
    return tokens / seconds if seconds > 0 else 0.0
