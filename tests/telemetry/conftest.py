"""A small run as the trainer would log it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpt_mega.config import Config, ModelConfig, ParallelConfig, TrainerConfig, save
from hpt_mega.rewards import Verdict
from hpt_mega.telemetry.run import RunLog
from hpt_mega.trajectory import Question

QUESTIONS = [
    Question(f"sum-{i}", "sum", f"What is {i} + {i}?", str(2 * i), "", (1, 2), (3,)) for i in (1, 2, 3)
]

VERDICTS = [
    Verdict(float(right), "same number" if right else "another number") for right in (0, 1, 0, 0, 1, 1)
]


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    """The config of a run of three steps, saved in its run_dir as `hpt train` does."""
    config = Config(
        model=ModelConfig("models/tiny-model"),
        parallel=ParallelConfig(tp=1, pp=3, dp=1),
        trainer=TrainerConfig(steps=3),
        run_dir=str(tmp_path / "run"),
    )
    config.data.heldout_questions = 100
    save(config, tmp_path / "run" / "config.yaml")
    return config


@pytest.fixture
def open_log(cfg: Config) -> Callable[..., RunLog]:
    """Makes the log of one rank of the run."""

    def make(resume_step: int | None = None, rank: int = 0) -> RunLog:
        return RunLog(cfg, SimpleNamespace(rank=rank, world_size=3), resume_step)  # type: ignore[arg-type]

    return make


def initial() -> dict[str, Any]:
    return {
        "step": 0,
        "eval/accuracy": 0.2,
        "eval/standard_error": 0.04,
        "eval/accuracy/sum": 0.3,
        "eval/accuracy/word problem": 0.1,
    }


def final() -> dict[str, Any]:
    return {
        "eval/accuracy": 0.5,
        "eval/standard_error": 0.03,
        "eval/accuracy/sum": 0.9,
        "eval/accuracy/word problem": 0.05,
    }


def trained(step: int, **more: Any) -> dict[str, Any]:
    """The record of a step; every number is another one."""
    return {
        "step": step,
        "reward": 0.125 * step,
        "reward_failed": 0.03 * step,
        "pass_rate": 0.1 * step,
        "sft_fraction": 0.5 / step,
        "response_length": 20.0 + step,
        "tokens_rollout": 1000.0 * step,
        "trajectories": 24.0,
        "policy_version": step,
        "loss": -0.5,
        "entropy": 1.0 / step,
        "tokens_trained": 300.0 * step,
        "logp_gap_mean": 0.01,
        "logp_gap_max": 0.2,
        "grad_norm": 1.5,
        "lr": 1e-5,
        "objective/ratio_max": 1.25,
        "timing": {"rollout": 4.0, "reward": 0.25, "train": 2.0, "sync": 0.125, "step": 6.5},
        **more,
    }


def log_whole_run(log: RunLog) -> None:
    """Three steps with their samples, an evaluation before and one after."""
    with log:
        log.record(0, initial())
        for step in (1, 2, 3):
            log.samples(step, QUESTIONS, [f"step {step}, response {i}" for i in range(6)], VERDICTS)
            log.record(step, trained(step, **(final() if step == 3 else {})))
        log.finish({})
