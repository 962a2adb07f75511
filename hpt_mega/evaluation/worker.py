"""One process of `hpt eval`: asks what is not yet answered, keeps the responses, and writes the results.

Started by launch.py as `python -m hpt_mega.evaluation.worker RUN_DIR/config.yaml`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from hpt_mega.checkpoint.hf import read_config
from hpt_mega.config import ConfigError
from hpt_mega.data.templates import stop_tokens
from hpt_mega.evaluation import tables
from hpt_mega.evaluation.benchmarks import Benchmark, contamination, load_benchmarks
from hpt_mega.evaluation.config import LONGEST_RESPONSE, RESPONSES, EvalConfig, load
from hpt_mega.evaluation.engines import ENGINES, job_config
from hpt_mega.evaluation.journal import GREEDY, SAMPLED, Graded, Journal
from hpt_mega.evaluation.results import results
from hpt_mega.evaluation.sample import Respondent, Response, respond
from hpt_mega.files import write_atomically
from hpt_mega.megatron import runtime
from hpt_mega.megatron.runtime import Layout
from hpt_mega.rewards.function import is_dotted
from hpt_mega.rewards.pool import RewardPool
from hpt_mega.rewards.verdict import Verdict
from hpt_mega.rollout.engine import SamplingParams
from hpt_mega.telemetry.metrics import PhaseTimer
from hpt_mega.trajectory import Question
from hpt_mega.worker import report_failure

ASKED = "asked.json"


@dataclass(frozen=True)
class Batch:
    """Questions asked together; the same whatever was answered before, so that their draws are too."""

    benchmark: Benchmark
    mode: str
    index: int
    questions: Sequence[Question]

    @property
    def samples(self) -> int:
        return 1 if self.mode == GREEDY else self.benchmark.k

    def seed(self, seed: int) -> int:
        return zlib.crc32(f"{seed}:{self.benchmark.name}:{self.mode}:{self.index}".encode())


@dataclass
class Evaluator:
    """What one rank evaluates with. Replicas take batches in turn; rank 0 keeps the responses."""

    cfg: EvalConfig
    layout: Layout
    engine: Respondent
    tokenizer: Any
    rewards: RewardPool | None  # on each replica's leader
    journal: Journal | None  # on rank 0

    def run(self, benchmarks: Sequence[Benchmark]) -> None:
        """Ask and grade all that the journal lacks."""
        todo = self._todo(benchmarks)
        for first in range(0, len(todo), self.layout.dp_size):
            mine = first + self.layout.dp_rank
            batch = todo[mine] if mine < len(todo) else replace(todo[first], questions=())
            parts = self.layout.gather_over_data(self._answer(batch))
            if self.journal is not None:
                self.journal.add([one for part in parts for one in part])
                print(f"{min(first + self.layout.dp_size, len(todo))} of {len(todo)} batches", flush=True)

    def _todo(self, benchmarks: Sequence[Benchmark]) -> list[Batch]:
        """The batches with a question that lacks a response: known to rank 0, told to all."""
        batches = list(_batches(benchmarks, self.cfg))
        missing: list[int] | None = None
        if self.journal is not None:
            missing = [
                number
                for number, batch in enumerate(batches)
                if not all(
                    self.journal.is_complete(batch.benchmark.name, batch.mode, q.id, batch.samples)
                    for q in batch.questions
                )
            ]
        told = self.layout.from_rank_zero(missing)
        assert told is not None
        return [batches[number] for number in told]

    def _answer(self, batch: Batch) -> list[tuple[Graded, str]]:
        sampled = batch.mode == SAMPLED
        assert self.cfg.max_new_tokens is not None
        sampling = SamplingParams(
            n=batch.samples,
            max_new_tokens=self.cfg.max_new_tokens,
            temperature=self.cfg.temperature if sampled else 0.0,
            top_p=self.cfg.top_p if sampled else 1.0,
            stop_tokens=stop_tokens(self.cfg.template, self.tokenizer),
            seed=batch.seed(self.cfg.seed),
        )
        kind = batch.benchmark.kind

        def grade(texts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
            kinds = [kind] * len(texts)
            found = self.rewards.verdicts(texts, answers, kinds) if self.rewards else None
            return self.layout.broadcast_object(found)

        groups = respond(self.engine, batch.questions, sampling, grade, self._decode)
        return [
            (_graded(batch, question, number, response), response.text)
            for question, group in zip(batch.questions, groups, strict=True)
            for number, response in enumerate(group)
        ]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def _batches(benchmarks: Sequence[Benchmark], cfg: EvalConfig) -> Iterator[Batch]:
    size = cfg.questions_per_batch
    for benchmark in benchmarks:
        modes = [*([GREEDY] if cfg.greedy else []), *([SAMPLED] if cfg.temperature > 0 else [])]
        for mode in modes:
            for index, start in enumerate(range(0, len(benchmark.questions), size)):
                yield Batch(benchmark, mode, index, benchmark.questions[start : start + size])


def _graded(batch: Batch, question: Question, sample: int, response: Response) -> Graded:
    return Graded(
        benchmark=batch.benchmark.name,
        mode=batch.mode,
        question=question.id,
        sample=sample,
        category=question.task,
        answer=question.answer,
        extracted=response.given,
        reward=response.reward,
        why=response.why,
        tokens=response.tokens,
        finished=response.finished,
    )


def evaluate(cfg: EvalConfig, layout: Layout, timer: PhaseTimer) -> None:
    """A whole evaluation, begun or resumed, to its results and tables in run_dir."""
    run_dir = Path(cfg.run_dir)
    started = time.monotonic()
    journal = Journal(run_dir / RESPONSES) if layout.rank == 0 else None
    reward = cfg.reward
    with ExitStack() as stack:
        with timer.phase("load"):
            tokenizer = AutoTokenizer.from_pretrained(cfg.model)
            benchmarks = load_benchmarks(cfg, tokenizer)
            cfg = replace(cfg, max_new_tokens=longest_response(cfg, benchmarks))
            if journal is not None:
                _keep_asked(run_dir / ASKED, Path(cfg.model), benchmarks, bool(journal.graded))
            engine = stack.enter_context(ENGINES[cfg.engine](cfg, layout))
        rewards = None
        if layout.is_leader:
            # a function is imported when the pool starts, not within the deadline of an answer
            kind = next((one.kind for one in benchmarks if is_dotted(one.kind)), benchmarks[0].kind)
            rewards = stack.enter_context(
                RewardPool(kind, reward.workers, reward.deadline_s, reward.memory_mib)
            )
        with timer.phase("evaluate"):
            Evaluator(cfg, layout, engine, tokenizer, rewards, journal).run(benchmarks)
    if journal is not None:
        with timer.phase("results"):
            overlap = contamination(cfg, benchmarks)
            seconds = time.monotonic() - started
            found = results(cfg, benchmarks, journal.graded.values(), overlap, seconds)
            _write(run_dir, found, cfg.published)


def longest_response(cfg: EvalConfig, benchmarks: Sequence[Benchmark]) -> int:
    """In tokens. Raises ConfigError where the longest prompt leaves too few of the model's positions."""
    positions: int = read_config(Path(cfg.model))["max_position_embeddings"]
    longest = max((q for one in benchmarks for q in one.questions), key=lambda q: len(q.prompt_tokens))
    left = positions - len(longest.prompt_tokens)
    wanted = cfg.max_new_tokens
    if left < (wanted or 1):
        lower = f"set max_new_tokens, which is {wanted}, to {left}, or " if wanted and left > 0 else ""
        raise ConfigError(
            f"{longest.id} is a prompt of {len(longest.prompt_tokens)} tokens and the model has {positions} "
            f"positions for prompt and response; {lower}leave that benchmark out"
        )
    return wanted or min(left, LONGEST_RESPONSE)


def _keep_asked(file: Path, model: Path, benchmarks: Sequence[Benchmark], has_responses: bool) -> None:
    """Note what the responses beside the file answer. Raises ConfigError where they answer something
    else."""
    files = [(path.name, path.stat()) for path in sorted(model.glob("*.safetensors"))]
    asked: dict[str, Any] = {"weights": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files]}
    for benchmark in benchmarks:
        told = [[q.id, q.prompt_tokens, q.answer] for q in benchmark.questions]
        asked[f"questions of {benchmark.name}"] = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    noted = json.loads(file.read_text()) if has_responses and file.is_file() else asked
    if changed := [what for what in noted if noted[what] != asked.get(what)]:
        raise ConfigError(
            f"{file.parent} holds responses from before the {' and the '.join(changed)} changed; "
            "set another run_dir"
        )
    write_atomically(file, json.dumps(asked) + "\n")


def _write(run_dir: Path, found: dict[str, Any], published: str) -> None:
    write_atomically(run_dir / "results.md", tables.markdown(found, published))
    write_atomically(run_dir / "results.tex", tables.latex(found, published))
    write_atomically(run_dir / "results.html", tables.html(found, published))
    write_atomically(run_dir / "results.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    print(tables.markdown(found, published))
    print(f"written: {run_dir}/results.json, .html, .md, .tex; responses.jsonl holds every response")


def main(config_path: str) -> int:
    cfg = load(Path(config_path))
    timer = PhaseTimer()
    layout = runtime.initialize(job_config(cfg))
    try:
        evaluate(cfg, layout, timer)
    except BaseException as error:
        report_failure(Path(cfg.run_dir), layout, timer, error)
        raise
    runtime.shutdown()
    return 0


if __name__ == "__main__":
    torch.multiprocessing.set_start_method("spawn", force=True)
    sys.exit(main(sys.argv[1]))
