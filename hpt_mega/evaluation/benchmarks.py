"""Benchmarks as lists of questions: from conf/benchmark, a data file, a dataset of the hub, or reasoning-gym.

No benchmark is part of this repository. How questions are asked lives in sample.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from hpt_mega.config import ColumnsConfig, ConfigError, conf_dir, fit, read_yaml
from hpt_mega.data.files import HUB, LETTERS, Record, is_data, read_records
from hpt_mega.data.overlap import WORDS, OverlapIndex
from hpt_mega.data.templates import conversation, render
from hpt_mega.evaluation.config import EvalConfig
from hpt_mega.rewards.function import is_dotted, load_function
from hpt_mega.rewards.pool import KINDS, is_kind
from hpt_mega.suggestion import did_you_mean
from hpt_mega.trajectory import Question

GYM = "reasoning_gym:"
GYM_QUESTIONS = 200  # of a generated task where no number is given
SPLIT_NAMES = ("test", "train", "valid", "validation", "dev")  # a file of such a name is named by its folder


@dataclass
class BenchmarkConfig:
    """A file of conf/benchmark."""

    source: str = ""  # a data file, hf:OWNER/NAME[:CONFIG] or reasoning_gym:TASK
    split: str = "test"
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    kind: str = "auto"  # math, choice, exact; auto: choice where every answer is a letter
    k: int = 1  # samples a question, as the paper has it
    options: dict[str, Any] = field(default_factory=dict)  # of a reasoning-gym task


@dataclass(frozen=True)
class Benchmark:
    name: str
    source: str
    kind: str
    k: int
    questions: list[Question]  # task is the category
    example: str  # the first question as the model is asked it


def load_benchmarks(cfg: EvalConfig, tokenizer: Any) -> list[Benchmark]:
    """The benchmarks of the config in order. Raises ConfigError where one cannot be had."""
    return [_load(name, cfg, tokenizer) for name in cfg.benchmarks]


def problems(cfg: EvalConfig) -> Iterator[str]:
    """What is wrong with `benchmarks`, as far as it can be told without their questions."""
    names = []
    for entry in cfg.benchmarks:
        try:
            name, config = describe(entry, cfg)
            names.append(name)
            _check_kind(config.kind, name)
            if config.source.startswith(GYM):
                _check_task(config.source.removeprefix(GYM))
        except (ConfigError, ImportError) as error:
            yield str(error)
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        yield f"benchmarks: {name} is named twice; name each once"


def describe(name: str, cfg: EvalConfig) -> tuple[str, BenchmarkConfig]:
    """(short name, where its questions come from) of an entry of `benchmarks`. Raises ConfigError."""
    folder = conf_dir() / "benchmark"
    if (folder / f"{name}.yaml").is_file():
        return name, _read_config(folder / f"{name}.yaml")
    if name.endswith((".yaml", ".yml")):
        return Path(name).stem, _read_config(Path(name))
    given = BenchmarkConfig(name, cfg.split, cfg.columns, cfg.kind)
    if name.startswith(GYM):
        return name.removeprefix(GYM), given
    if not is_data(name):
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(
            f"benchmarks: {name!r} is none of conf/benchmark ({known}), no file .jsonl, .json or .parquet, "
            f"nor {HUB}OWNER/NAME or {GYM}TASK"
        )
    if not name.startswith(HUB) and not Path(name).is_file():
        raise ConfigError(f"benchmarks: {name}: no such file (looked for {Path(name).absolute()})")
    path = Path(name.removeprefix(HUB).partition(":")[0])
    stem = path.name if name.startswith(HUB) else path.stem
    return (path.absolute().parent.name if stem in SPLIT_NAMES else stem), given


def _read_config(path: Path) -> BenchmarkConfig:
    return fit(BenchmarkConfig, str(path), read_yaml(path, "a benchmark as in conf/benchmark"))


def _load(entry: str, cfg: EvalConfig, tokenizer: Any) -> Benchmark:
    name, config = describe(entry, cfg)
    try:
        records = list(islice(_records(config, cfg), cfg.questions or None))
    except (ValueError, ImportError, OSError) as error:
        raise ConfigError(f"benchmark {name}: {error}") from error
    if not records:
        raise ConfigError(f"benchmark {name}: {config.source} has no questions")
    if absent := [i for i, record in enumerate(records) if not record.answer]:
        raise ConfigError(
            f"benchmark {name}: {len(absent)} questions of {config.source} have no answer, the first is "
            f"number {absent[0] + 1}; name the column of the answers, as in columns.answer=solution"
        )
    kind = _kind(config.kind, records)
    asked = [_as_asked(record, cfg, tokenizer) for record in records]
    questions = [
        Question(
            id=f"{name}/{number}",
            task=record.task or name,
            prompt=record.prompt,
            answer=record.answer,
            demonstration="",
            prompt_tokens=tuple(tokenizer(text, add_special_tokens=False).input_ids),
            demonstration_tokens=(),
        )
        for number, (record, text) in enumerate(zip(records, asked, strict=True))
    ]
    return Benchmark(name, config.source, kind, cfg.k or config.k, questions, asked[0])


def _records(config: BenchmarkConfig, cfg: EvalConfig) -> Iterator[Record]:
    if not config.source.startswith(GYM):
        yield from read_records(config.source, config.columns, config.split)
        return
    import reasoning_gym

    task = config.source.removeprefix(GYM)
    size = cfg.questions or GYM_QUESTIONS
    for entry in reasoning_gym.create_dataset(task, seed=cfg.seed, size=size, **config.options):
        yield Record(prompt=entry["question"].strip(), answer=str(entry["answer"]))


def _check_task(task: str) -> None:
    import reasoning_gym

    if task not in reasoning_gym.factory.DATASETS:
        near = did_you_mean(task, reasoning_gym.factory.DATASETS)
        raise ConfigError(f"benchmarks: reasoning-gym has no task {task!r}{near}")


def _kind(kind: str, records: list[Record]) -> str:
    if kind != "auto":
        return kind
    are_letters = all(re.fullmatch(rf"\(?[{LETTERS}]\)?\.?", r.answer.strip()) for r in records)
    return "choice" if are_letters else "math"


def _check_kind(kind: str, name: str) -> None:
    if kind != "auto" and not is_kind(kind):
        raise ConfigError(
            f"benchmark {name}: kind is {kind!r}, expected auto, {', '.join(KINDS)}, or MODULE.FUNCTION"
        )
    if is_dotted(kind):
        try:
            load_function(kind)
        except ValueError as error:
            raise ConfigError(f"benchmark {name}: kind {error}") from error


def _as_asked(record: Record, cfg: EvalConfig, tokenizer: Any) -> str:
    messages = conversation(record.earlier, record.prompt, cfg.instruction, keep_system=False)
    return render(cfg.template, messages, tokenizer)


def contamination(cfg: EvalConfig, benchmarks: list[Benchmark]) -> dict[str, Any] | None:
    """By benchmark, which questions share a run of 13 words with a training prompt; None where not asked."""
    if not cfg.training_data:
        return None
    indices = {b.name: OverlapIndex([question.prompt for question in b.questions]) for b in benchmarks}
    for source in cfg.training_data:
        for record in read_records(source, cfg.training_columns):
            for index in indices.values():
                index.add([record.prompt])
    return {
        benchmark.name: {
            "words": WORDS,
            "training_data": list(cfg.training_data),
            "overlapping": {
                benchmark.questions[i].id: run for i, run in indices[benchmark.name].overlapping.items()
            },
        }
        for benchmark in benchmarks
    }
