"""The checks of a config made before any process starts: does the model fit the layout, do the parts fit.

One module a concern. What a key may hold by its type alone is settled by config.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch

from hpt_mega.checkpoint.model_folder import read_model
from hpt_mega.config import Config, ConfigError
from hpt_mega.validation import data, layout, model, objective, optimizer, precision, rollout, run, values

__all__ = ["contradictions", "missing_here", "validate", "validate_server"]


def validate(cfg: Config) -> None:
    """Raise one ConfigError that lists every problem of the config; return where there is none.

    Reads the model's config.json, the run folder and the environment (torchrun, SLURM, number of GPUs).
    """
    shape, problems = read_model(cfg.model)
    found = [
        *problems,
        *data.files(cfg),
        *rollout.engine(cfg),
        *contradictions(cfg, shape, on_gpu=torch.cuda.is_available()),
        *layout.processes(cfg),
        *run.folder(cfg),
    ]
    _refuse(found)


def validate_server(cfg: Config) -> None:
    """As `validate`, of what concerns `hpt serve`."""
    shape, problems = read_model(cfg.model)
    _refuse(
        [
            *problems,
            *rollout.serves(cfg),
            *values.numbers(cfg),
            *values.names(cfg),
            *rollout.servers(cfg, shape, torch.cuda.is_available()),
        ]
    )


def missing_here(cfg: Config) -> list[str]:
    """What the config names and this machine does not have: the model's folder, data files, an engine."""
    return [*read_model(cfg.model)[1], *data.files(cfg), *rollout.engine(cfg)]


def _refuse(found: Sequence[str]) -> None:
    if found:
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(found, start=1))
        count = "1 problem" if len(found) == 1 else f"{len(found)} problems"
        raise ConfigError(f"{count} in the config; nothing was started\n{listed}")


def contradictions(cfg: Config, shape: Mapping[str, Any], *, on_gpu: bool) -> list[str]:
    """What is wrong with the config on any machine with GPUs, or without. `shape`: config.json, or empty."""
    simple = [*values.numbers(cfg), *values.names(cfg), *data.tasks(cfg)]
    if min(vars(cfg.parallel)[size] for size in values.SIZES) < 1:
        return simple  # what follows computes with the layout
    checks = chain(
        simple,
        layout.tensor(cfg, shape, on_gpu),
        precision.fp8(cfg, shape, on_gpu),
        layout.pipeline(cfg, shape),
        layout.experts(cfg, shape),
        layout.trained_experts(cfg, shape),
        objective.batch(cfg),
        model.lengths(cfg, shape),
        objective.parts(cfg),
        optimizer.parameters(cfg, shape, on_gpu),
        optimizer.offload(cfg, on_gpu),
        rollout.servers(cfg, shape, on_gpu),
    )
    return list(checks)
