"""The trackers that a run's numbers also go to: tensorboard, wandb, mlflow, each through its own library.

All three write into RUN_DIR (wandb offline); the run's own record is metrics.jsonl, whatever is chosen here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


class Logger(Protocol):
    """Takes the numbers of a step; a step may come again after a resume, and the later one counts."""

    def log(self, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def problems(names: list[str]) -> Iterator[str]:
    """Unknown loggers, and known ones whose library is missing."""
    for name in names:
        if name not in MODULES:
            yield f"telemetry.loggers names {name!r}, expected some of {', '.join(MODULES)}"
        elif importlib.util.find_spec(MODULES[name]) is None:
            yield f"telemetry.loggers names {name!r}, which is not installed; pip install -e '.[{name}]'"


def open_loggers(names: list[str], run_dir: Path) -> list[Logger]:
    return [_OPENERS[name](run_dir) for name in names]


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record, those of its timing as timing/PHASE."""
    flat = {key: value for key, value in record.items() if key != "step" and _is_number(value)}
    timing = record.get("timing", {})
    return flat | {f"timing/{phase}": seconds for phase, seconds in timing.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _TensorBoard:
    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, run_dir: Path) -> None:
        wandb: Any = importlib.import_module("wandb")
        (run_dir / "wandb").mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project="hpt_mega", name=run_dir.name, id=run_dir.name, dir=str(run_dir), mode="offline"
        )

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, run_dir: Path) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        folder = (run_dir / "mlflow").absolute()
        self._client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}.db")
        experiment = self._client.get_experiment_by_name(run_dir.name)
        number = (
            experiment.experiment_id
            if experiment
            else self._client.create_experiment(run_dir.name, artifact_location=folder.as_uri())
        )
        self._run_id = self._client.create_run(number).info.run_id

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._client.log_metric(self._run_id, name, value, step=step)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


_OPENERS: dict[str, Callable[[Path], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}
