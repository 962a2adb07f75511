"""The verb `hpt eval`: its settings, what is refused before any process starts, and how it is started.

The evaluation itself is worker.py.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

from hpt_mega.config import ConfigError, save
from hpt_mega.config import leaves as key_names
from hpt_mega.evaluation.config import EvalConfig, check_resumable, compose, load

WORKER = "hpt_mega.evaluation.worker"


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
        "hf:OWNER/NAME or reasoning_gym:TASK"
    )
    names = ", ".join(key_names(EvalConfig))
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=names)
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    cfg = compose(options.settings)
    config_path = Path(cfg.run_dir) / "config.yaml"
    validate(cfg)
    if config_path.is_file():
        check_resumable(cfg, load(config_path))

    from hpt_mega.launch import run_worker, start_processes

    save(cfg, config_path)
    if "RANK" in os.environ:
        return run_worker(config_path, WORKER)
    return start_processes(cfg.parallel.world_size, config_path, WORKER)


def validate(cfg: EvalConfig) -> None:
    """Raise one ConfigError that lists every problem of the config."""
    problems = list(_problems(cfg))
    if problems:
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, start=1))
        raise ConfigError(f"hpt eval cannot start:\n{listed}")


def _problems(cfg: EvalConfig) -> Iterator[str]:
    from hpt_mega.data.templates import TEMPLATES
    from hpt_mega.evaluation.benchmarks import describe
    from hpt_mega.evaluation.engines import ENGINES
    from hpt_mega.evaluation.published import PUBLISHED

    for key, known in (("engine", ENGINES), ("template", TEMPLATES), ("published", ("", *PUBLISHED))):
        if getattr(cfg, key) not in known:
            yield f"{key} is {getattr(cfg, key)!r}, expected one of {', '.join(filter(None, known))}"
    low = [key for key in ("k", "questions", "temperature") if getattr(cfg, key) < 0]
    low += [
        key for key in ("max_new_tokens", "max_sequences", "questions_per_batch") if getattr(cfg, key) < 1
    ]
    yield from (f"{key} is {getattr(cfg, key)}, which is too low" for key in low)
    if cfg.engine == "vllm" and max(cfg.parallel.tp, cfg.parallel.pp, cfg.parallel.cp) > 1:
        yield "engine=vllm serves the whole model to each replica; set only parallel.dp above 1"
    if not 0 < cfg.top_p <= 1:
        yield f"top_p is {cfg.top_p}, expected above 0 and at most 1"
    if cfg.temperature == 0 and not cfg.greedy:
        yield "temperature is 0 and greedy is false; nothing is left to ask"
    for name in cfg.benchmarks:
        try:
            describe(name, cfg)
        except ConfigError as error:
            yield str(error)
    yield from _model(cfg)


def _model(cfg: EvalConfig) -> Iterator[str]:
    config = Path(cfg.model) / "config.json"
    if not config.is_file():
        yield f"model={cfg.model} holds no config.json; expected a Hugging Face folder"
    else:
        positions = json.loads(config.read_text()).get("max_position_embeddings", 0)
        if 0 < positions <= cfg.max_new_tokens:
            yield (
                f"max_new_tokens is {cfg.max_new_tokens} and the model has {positions} positions for prompt "
                "and response; lower it"
            )
