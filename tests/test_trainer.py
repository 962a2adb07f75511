"""What the trainer asks of an engine: where responses end, and with which seeds they are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpt_mega.config import Config, DataConfig, EvaluationConfig
from hpt_mega.evaluation.benchmarks import Benchmark
from hpt_mega.evaluation.config import EvalConfig
from hpt_mega.evaluation.journal import Journal
from hpt_mega.evaluation.worker import Evaluator
from hpt_mega.rewards import Verdict
from hpt_mega.rollout.engine import Sample, SamplingParams
from hpt_mega.telemetry.metrics import PhaseTimer
from hpt_mega.trainer import Trainer
from hpt_mega.trajectory import Question
from tests.data.byte_tokenizer import byte_tokenizer

QUESTIONS = [Question(str(i), "sums", "", "7", "", (i,), ()) for i in range(7)]


class Recording:
    """An engine and a grader that note what they were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, SamplingParams]] = []  # number of prompts, how

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        self.asked.append((len(prompts), sampling))
        return [[Sample((1,), (0.0,), True, 0)] * sampling.n for _ in prompts]

    def submit(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> Any:
        return partial(self.generate, prompts, sampling)

    def verdicts(self, texts: Sequence[str], answers: Sequence[str], kinds: Any = None) -> list[Verdict]:
        return [Verdict(1.0, "") for _ in texts]


def replica(dp_rank: int = 0, dp_size: int = 1) -> Any:
    """A layout of one rank, which hears from no other."""
    return SimpleNamespace(
        dp_rank=dp_rank,
        dp_size=dp_size,
        gather_over_data=lambda value: [value],
        broadcast_object=lambda value: value,
        from_rank_zero=lambda value: value,
    )


def trainer(
    cfg: Config, engine: Recording, dp_rank: int = 0, dp_size: int = 1, tokenizer: Any = None
) -> Trainer:
    absent: dict[str, Any] = dict.fromkeys(("learner", "gate", "store", "log", "interruption", "health"))
    return Trainer(
        cfg=cfg,
        layout=replica(dp_rank, dp_size),
        engine=engine,  # type: ignore[arg-type]
        loader=SimpleNamespace(next_batch=lambda step: QUESTIONS[:3]),  # type: ignore[arg-type]
        heldout=QUESTIONS,
        rewards=engine,  # type: ignore[arg-type]
        tokenizer=tokenizer or byte_tokenizer(),
        timer=PhaseTimer(),
        **absent,
    )


@pytest.mark.parametrize(("template", "ends"), [("qwen_math", ["<e>", "<|im_end|>"]), ("chat", ["<e>"])])
def test_a_model_is_sampled_with_the_stop_tokens_it_is_evaluated_with(
    template: str, ends: list[str], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    engine = Recording()
    training = trainer(Config(data=DataConfig(template=template)), engine, tokenizer=tokenizer)
    _, collect = training.ask(0)
    collect()
    training.evaluate()
    cfg = EvalConfig(model="m", benchmarks=["b"], template=template, max_new_tokens=8)
    rewards: Any = engine
    evaluator = Evaluator(cfg, replica(), engine, tokenizer, rewards, Journal(tmp_path / "responses.jsonl"))
    evaluator.run([Benchmark("b", "b.json", "math", 2, QUESTIONS, "")])
    assert len(engine.asked) == 4  # rollouts, held-out questions, greedily and sampled
    assert {sampling.stop_tokens for _, sampling in engine.asked} == {
        tuple(tokenizer.convert_tokens_to_ids(ends))
    }


def test_a_replica_without_questions_keeps_those_company_that_share_its_experts() -> None:
    engine, layout = Recording(), replica(dp_rank=1, dp_size=2)
    layout.from_rank_zero = lambda value: [0]
    cfg = EvalConfig(model="m", benchmarks=["b"], max_new_tokens=8, greedy=False)
    rewards: Any = engine
    evaluator = Evaluator(cfg, layout, engine, byte_tokenizer(), rewards, None)
    evaluator.run([Benchmark("b", "b.json", "math", 1, QUESTIONS, "")])
    assert [prompts for prompts, _ in engine.asked] == [0]


def test_no_two_samples_of_any_replicas_steps_or_runs_share_a_seed() -> None:
    seeds: list[int] = []
    for seed in (5, 6):
        for rank in range(3):
            engine = Recording()
            cfg = Config(seed=seed, evaluation=EvaluationConfig(samples=4, temperature=0.6))
            training = trainer(cfg, engine, rank, 3)
            training.evaluate()
            for step in range(3):
                training.ask(step)[1]()
            # as engines have it: sample j of prompt i
            seeds += [how.seed + i for prompts, how in engine.asked for i in range(prompts * how.n)]
    assert len(seeds) == 2 * (7 * 4 + 3 * 3 * 3 * Config().rollout.rollouts_per_question)
    assert len({seed % 2**62 for seed in seeds}) == len(seeds)


def test_held_out_questions_are_drawn_alike_at_every_step() -> None:
    engine = Recording()
    training = trainer(Config(evaluation=EvaluationConfig(samples=2, temperature=0.6)), engine)
    training.evaluate()
    training.step = 7
    training.evaluate()
    assert engine.asked[0] == engine.asked[1]
