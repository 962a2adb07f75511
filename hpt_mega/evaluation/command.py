"""The verb `hpt eval`: its settings, what is refused before any process starts, and how it is started.

The evaluation itself is worker.py.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from operator import attrgetter
from pathlib import Path
from typing import Any

from hpt_mega.config import ConfigError
from hpt_mega.config import leaves as key_names
from hpt_mega.evaluation.config import CONFIG, LONGEST_RESPONSE, EvalConfig, check_folder, compose

WORKER = "hpt_mega.evaluation.worker"
BOUNDS = {
    "0 or above": "k questions temperature",
    "1 or above": "max_sequences questions_per_batch reward.workers reward.memory_mib",
    "above 0": """
deadline_s reward.deadline_s server.kv_cache_gib server.gpu_memory_share server.start_deadline_s top_p
""",
    "at most 1": "top_p server.gpu_memory_share",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Give the verb's parser its options."""
    parser.description = (
        "Ask a model the questions of benchmarks, greedily and k times each; avg@k and pass@k with "
        "intervals, as JSON, HTML, Markdown and LaTeX, beside the published rows. The same command goes on "
        "after a kill."
    )
    parser.epilog = (
        "example: hpt eval model=models/smollm2-135m-instruct benchmarks=[gsm_symbolic] k=4 questions=40 "
        "max_new_tokens=256; hpt eval model=PATH benchmarks=[aime24,math500,data/GPQA/test.json] k=32 "
        "template=qwen_math; benchmarks are names of conf/benchmark, files .json, .jsonl or .parquet, "
        "hf:OWNER/NAME or reasoning_gym:TASK; without max_new_tokens a response has the positions that the "
        f"longest prompt leaves it, at most {LONGEST_RESPONSE}"
    )
    names = ", ".join(key_names(EvalConfig))
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=names)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    cfg = compose(options.settings)
    validate(cfg)
    check_folder(cfg)

    from hpt_mega.evaluation.engines import job_config
    from hpt_mega.launch import run

    return run(cfg, Path(cfg.run_dir) / CONFIG, WORKER, job_config(cfg).parallel.world_size)


def validate(cfg: EvalConfig) -> None:
    """Raise one ConfigError that lists every problem of the config."""
    problems = list(_problems(cfg))
    if problems:
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, start=1))
        raise ConfigError(f"hpt eval cannot start:\n{listed}")


def _problems(cfg: EvalConfig) -> Iterator[str]:
    from hpt_mega.data.files import HUB, is_data
    from hpt_mega.data.templates import TEMPLATES
    from hpt_mega.evaluation import benchmarks
    from hpt_mega.evaluation.engines import ENGINES
    from hpt_mega.evaluation.published import PUBLISHED
    from hpt_mega.validation.data import known_file
    from hpt_mega.validation.values import PRECISIONS

    for key, known in (
        ("engine", ENGINES),
        ("precision.dtype", PRECISIONS),
        ("template", TEMPLATES),
        ("published", ("", *PUBLISHED)),
    ):
        if (given := attrgetter(key)(cfg)) not in known:
            yield f"{key} is {given!r}, expected one of {', '.join(filter(None, known))}"
    yield from _numbers(cfg)
    if cfg.temperature == 0 and not cfg.greedy:
        yield "temperature is 0 and greedy is false; nothing is left to ask"
    yield from benchmarks.problems(cfg)
    for file in cfg.training_data:
        if is_data(file):
            yield from known_file("training_data", file)
        else:
            yield f"training_data: {file!r}: expected files .jsonl, .json or .parquet, or {HUB}OWNER/NAME"
    yield from _model(cfg)


def _model(cfg: EvalConfig) -> Iterator[str]:
    from hpt_mega.checkpoint.megatron_folder import is_megatron
    from hpt_mega.checkpoint.model_folder import read_model
    from hpt_mega.config import ModelConfig

    if is_megatron(Path(cfg.model)):
        yield (
            f"model={cfg.model} is a Megatron checkpoint; expected a Hugging Face folder, which "
            "`hpt convert megatron-to-hf` makes of it"
        )
        return
    model, problems = read_model(ModelConfig(path=cfg.model), "model")
    yield from problems
    if not model:
        return
    positions = model["max_position_embeddings"]
    if cfg.max_new_tokens is not None and positions <= cfg.max_new_tokens:
        yield (
            f"max_new_tokens is {cfg.max_new_tokens} and the model has {positions} positions for prompt "
            "and response; lower it, or leave it out"
        )
    yield from _layout(cfg, model)


def _numbers(cfg: EvalConfig) -> Iterator[str]:
    from hpt_mega.validation.bounds import infinite, outside

    sizes = " ".join(f"parallel.{key}" for key in _sizes(cfg))
    yield from outside(cfg, BOUNDS)
    yield from outside(cfg, {"1 or above": sizes})
    yield from infinite(cfg)
    if cfg.max_new_tokens is not None and cfg.max_new_tokens < 1:
        yield f"max_new_tokens is {cfg.max_new_tokens}, expected 1 or above, or null"
    if not 0 < cfg.level < 1:
        yield f"level is {cfg.level}, expected above 0 and below 1, such as 0.95"


def _sizes(cfg: EvalConfig) -> dict[str, int]:
    return {key: value for key, value in asdict(cfg.parallel).items() if isinstance(value, int)}


def _layout(cfg: EvalConfig, shape: Mapping[str, Any]) -> Iterator[str]:
    """Whether the model, with the config.json `shape`, and the machine fit the layout."""
    import torch

    from hpt_mega.evaluation.engines import job_config
    from hpt_mega.validation import layout

    sizes = _sizes(cfg)
    if min(sizes.values()) < 1:
        return
    is_split = any(size > 1 for key, size in sizes.items() if key != "dp") or cfg.parallel.stage_layers
    if cfg.engine == "vllm" and is_split:
        yield "engine=vllm serves the whole model to each replica; set only parallel.dp above 1"
        return
    job = job_config(cfg)
    yield from layout.tensor(job, shape, torch.cuda.is_available())
    yield from layout.pipeline(job, shape)
    yield from layout.experts(job, shape)
    if "RANK" not in os.environ:
        yield from layout.gpus(job)
