"""A process of the lab that trains and evaluates many models one after the other, without starting anew.

Reads jobs as JSON lines and answers each with a line; what is run, and for how long, is decided in runner.py.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from hpt_mega.config import compose, save
from hpt_mega.evaluation import worker as evaluation
from hpt_mega.evaluation.command import validate as validate_evaluation
from hpt_mega.evaluation.config import EvalConfig
from hpt_mega.evaluation.config import compose as compose_evaluation
from hpt_mega.evaluation.engines import job_config
from hpt_mega.evaluation.journal import GREEDY, SAMPLED, Journal
from hpt_mega.files import write_atomically
from hpt_mega.interruption import Interruption
from hpt_mega.launch import single_rank_environment
from hpt_mega.megatron import runtime
from hpt_mega.telemetry.metrics import PhaseTimer
from hpt_mega.telemetry.runs import COUNTS, Counts
from hpt_mega.validation import validate
from hpt_mega.worker import train


def train_here(overrides: Sequence[str]) -> None:
    """`hpt train` with one process, this one."""
    cfg = compose(overrides)
    validate(cfg)
    save(cfg, Path(cfg.run_dir) / "config.yaml")
    layout = runtime.initialize(cfg)
    try:
        train(cfg, layout, PhaseTimer(), Interruption())
    finally:
        runtime.shutdown()


def evaluate_here(settings: Sequence[str]) -> None:
    """`hpt eval` with one process, this one."""
    cfg: EvalConfig = compose_evaluation(settings)
    validate_evaluation(cfg)
    Path(cfg.run_dir).mkdir(parents=True, exist_ok=True)
    layout = runtime.initialize(job_config(cfg))
    try:
        evaluation.evaluate(cfg, layout, PhaseTimer())
    finally:
        runtime.shutdown()
    _count(Path(cfg.run_dir))


def _count(run_dir: Path) -> None:
    """Keep how often each question was solved, all that a comparison asks of the responses."""
    responses = list(Journal(run_dir / "responses.jsonl").graded.values())
    sampled = [one for one in responses if one.mode == SAMPLED]
    task = {one.question: one.category for one in sampled}
    counts = Counts(
        samples=len(sampled) // len(task),
        task=task,
        correct={question: 0 for question in task},
        greedy={one.question: one.reward for one in responses if one.mode == GREEDY},
    )
    for one in sampled:
        counts.correct[one.question] += one.reward > 0.5
    write_atomically(run_dir / COUNTS, json.dumps(asdict(counts)) + "\n")


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"train": train_here, "eval": evaluate_here}


def main() -> int:
    """Work until standard input ends. A job that fails ends the process: the next one gets a fresh one."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    for line in sys.stdin:
        job = json.loads(line)
        log = Path(job["log"])
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
                os.dup2(file.fileno(), stream.fileno())
        os.environ.update(single_rank_environment())  # each job's store listens anew, at a port free by now
        try:
            VERBS[job["verb"]](job["settings"])
        except Exception as error:  # whatever it is, the runner shall hear of it
            traceback.print_exc()
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies)
            return 1
        print(json.dumps({}), file=replies)
    return 0


if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn", force=True)
    sys.exit(main())
