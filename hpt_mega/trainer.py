"""The training step of HPT, one stage a line: questions, rollouts, rewards, schedule, update, new weights.

What each stage does lives in its own package; how the parts are made and torn down in worker.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hpt_mega.checkpoint.store import CheckpointStore
from hpt_mega.config import Config
from hpt_mega.data.loader import QuestionLoader
from hpt_mega.data.templates import stop_tokens
from hpt_mega.evaluation.heldout import NONE, Accuracy, evaluate, overall
from hpt_mega.interruption import Interruption
from hpt_mega.megatron.learner import Learner
from hpt_mega.megatron.runtime import Layout
from hpt_mega.megatron.step import Metrics
from hpt_mega.replay import append_batch, read_batches
from hpt_mega.rewards.pool import RewardError, RewardPool
from hpt_mega.rewards.verdict import Verdict
from hpt_mega.rollout.engine import Collect, EngineError, RolloutEngine, Sample, SamplingParams
from hpt_mega.scheduler.blend import Schedule, schedule
from hpt_mega.scheduler.gate import Gate
from hpt_mega.telemetry.health import Health, watch_for_hangs
from hpt_mega.telemetry.metrics import PhaseTimer
from hpt_mega.telemetry.run import RunLog
from hpt_mega.trajectory import Question, Source, Trajectory

HELD_OUT = -1  # in place of a step, where the held-out questions are asked


@dataclass
class Trainer:
    """Everything one process needs to train; every rank of the job runs the same methods together."""

    cfg: Config
    layout: Layout
    learner: Learner
    engine: RolloutEngine
    gate: Gate
    loader: QuestionLoader
    heldout: Sequence[Question]
    rewards: RewardPool | None  # on each replica's leader
    tokenizer: Any
    store: CheckpointStore
    log: RunLog
    timer: PhaseTimer
    interruption: Interruption
    health: Health
    step: int = 0  # optimizer steps done; also the policy's version
    asked: deque[tuple[Sequence[Question], Collect]] = field(default_factory=deque)  # from this step on

    @cached_property
    def stop_tokens(self) -> tuple[int, ...]:
        """What ends a response, of rollouts and on held-out questions: as in `hpt eval`."""
        return stop_tokens(self.cfg.data.template, self.tokenizer)

    def run(self) -> bool:
        """Train from `self.step` to the configured number of steps, evaluating and saving on the way.

        Returns whether that number was reached: a run that is asked to stop saves after its step, and stops.
        """
        if self.step == 0:
            self.log.record(0, {"step": 0, **self.evaluate(), "timing": self.timer.take()})
        while self.step < self.cfg.trainer.steps:
            watch_for_hangs(self.cfg.trainer.deadline_s)
            record = self.train_step()
            if self._is_due(self.cfg.trainer.eval_every):
                record |= self.evaluate()
            timing = self.timer.take()
            self.log.record(self.step, record | {"timing": timing})
            self.health.observe(self.step, timing)
            with self.timer.phase("checkpoint"):
                self.store.settle(wait=False)
            stop = self.interruption.reached_any(self.layout) and self.step < self.cfg.trainer.steps
            if stop or self._is_due(self.cfg.trainer.save_every):
                self.save()
            if stop:
                break
        with self.timer.phase("checkpoint"):
            self.store.settle()
        return self.step >= self.cfg.trainer.steps

    def train_step(self) -> dict[str, Any]:
        """One step of HPT (arXiv 2509.04419, algorithm 1); returns its metrics."""
        if self.cfg.debug.replay:
            return self.replay_step()
        questions, rollouts = self.rollouts()
        rewarded, failures = self.reward(questions, rollouts)
        self.observe(rewarded)
        plan = schedule(
            rewarded,
            questions,
            self.gate,
            policy_version=self.step,
            pairs=self.learner.estimator.trains_on_pairs,
            first_group=self.layout.dp_rank * len(questions),
        )
        if self.cfg.debug.save:
            self.save_batch(plan.trajectories)
        metrics = self.learn(plan.trajectories)
        self.step += 1
        with self.timer.phase("sync"):
            metrics |= self.engine.update_weights(policy_version=self.step)
        described = self._describe(rewarded, failures, plan)
        if described.get("reward_failed") == 1.0:
            raise RewardError(
                f"no response of step {self.step} could be judged, one because of: {failures[0]}. For more "
                f"see {self.cfg.run_dir}/samples.jsonl. A function given as reward.kind has to return 0 for "
                "what is merely wrong; where it is slow, raise reward.deadline_s or reward.workers"
            )
        return {"step": self.step, **described, **metrics}

    def replay_step(self) -> dict[str, Any]:
        """A step on the trajectories of a file, of which each replica brings an equal part."""
        batch = read_batches(Path(self.cfg.debug.replay))[self.step + 1]
        rank, size = self.layout.dp_rank, self.layout.dp_size
        first, end = len(batch) * rank // size, len(batch) * (rank + 1) // size
        metrics = self.learn(batch[first:end])
        self.step += 1
        with self.timer.phase("sync"):
            metrics |= self.engine.update_weights(policy_version=self.step)
        questions = {t.group for t in batch}
        demonstrated = {t.group for t in batch if t.source is Source.OFFLINE}
        return {
            "step": self.step,
            "sft_fraction": len(demonstrated) / max(1, len(questions)),
            "tokens_rollout": 0.0,
            "trajectories": len(batch),
            "policy_version": self.step,
            **metrics,
        }

    def save_batch(self, trajectories: Sequence[Trajectory]) -> None:
        """Keep the step's trajectories of all replicas for `debug.replay`."""
        replicas = self.layout.gather_over_data(list(trajectories))
        if self.layout.rank == 0:
            everyone = [t for replica in replicas for t in replica]
            append_batch(Path(self.cfg.debug.save), self.step + 1, everyone)

    def rollouts(self) -> tuple[Sequence[Question], list[list[Sample]]]:
        """This step's questions with n samples each, asked for up to `rollout.staleness` steps ago.

        On resume what was in flight is asked for again: questions and seeds follow from the step alone.
        """
        while len(self.asked) <= min(self.cfg.rollout.staleness, self.cfg.trainer.steps - 1 - self.step):
            self.asked.append(self.ask(self.step + len(self.asked)))
        questions, collect = self.asked.popleft()
        with self.timer.phase("rollout"):
            rollouts = collect()
        oldest = min((s.policy_version for samples in rollouts for s in samples), default=self.step)
        if self.step - oldest > self.cfg.rollout.staleness:
            raise EngineError(
                f"step {self.step} was given a sample of policy version {oldest}, rollout.staleness is "
                f"{self.cfg.rollout.staleness}"
            )
        return questions, rollouts

    def ask(self, step: int) -> tuple[Sequence[Question], Collect]:
        """The questions of a step, with a call that waits for their samples."""
        questions, rollout = self.loader.next_batch(step), self.cfg.rollout
        if rollout.rollouts_per_question == 0:
            return questions, lambda: [[] for _ in questions]
        sampling = SamplingParams(
            n=rollout.rollouts_per_question,
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            stop_tokens=self.stop_tokens,
            seed=self._seed(step),
        )
        return questions, self.engine.submit([question.prompt_tokens for question in questions], sampling)

    def reward(
        self, questions: Sequence[Question], rollouts: Sequence[Sequence[Sample]]
    ) -> tuple[list[list[Trajectory]], list[str]]:
        """The samples as rewarded trajectories, by question, and why some could not be judged."""
        answers = [
            question.answer for question, samples in zip(questions, rollouts, strict=True) for _ in samples
        ]
        texts = [self.decode(sample.tokens) for samples in rollouts for sample in samples]
        with self.timer.phase("reward"):
            verdicts = self._grade(texts, answers)
        rewards = iter(verdict.reward for verdict in verdicts)
        first_group = self.layout.dp_rank * len(questions)
        rewarded = [
            [
                Trajectory(
                    prompt_tokens=question.prompt_tokens,
                    response_tokens=sample.tokens,
                    group=first_group + index,
                    source=Source.ONLINE,
                    policy_version=sample.policy_version,
                    rollout_logp=sample.logp,
                    reward=next(rewards),
                )
                for sample in samples
            ]
            for index, (question, samples) in enumerate(zip(questions, rollouts, strict=True))
        ]
        self.log.samples(self.step + 1, questions, texts, verdicts)
        return rewarded, [verdict.why for verdict in verdicts if verdict.failed]

    def observe(self, rewarded: Sequence[Sequence[Trajectory]]) -> None:
        """Tell a curriculum how often the step's questions were solved, on all replicas."""
        if self.loader.has_curriculum:
            rates = [sum(t.reward for t in group) / len(group) if group else 0.0 for group in rewarded]
            parts = self.layout.gather_over_data(rates)
            self.loader.observe([rate for part in parts for rate in part])

    def learn(self, trajectories: Sequence[Trajectory]) -> Metrics:
        """The optimizer's updates on the unified objective, over all replicas' trajectories."""
        with self.timer.phase("sync"):
            self.engine.sleep()
        with self.timer.phase("train"):
            return self.learner.learn(trajectories, self.step)

    def evaluate(self) -> dict[str, float]:
        """Held-out accuracy, split over the replicas; the draws are the same at every step."""
        mine = self.heldout[self.layout.dp_rank :: self.layout.dp_size]
        asked = self.cfg.evaluation
        sampling = SamplingParams(
            n=asked.samples,
            max_new_tokens=self.cfg.rollout.max_new_tokens,
            temperature=asked.temperature,
            top_p=asked.top_p,
            stop_tokens=self.stop_tokens,
            seed=self._seed(HELD_OUT),
        )
        with self.timer.phase("eval"):
            local = evaluate(self.engine, mine, sampling, self._grade, self.decode)
            by_task: dict[str, Accuracy] = {}
            for part in self.layout.gather_over_data(local):
                for task, accuracy in part.items():
                    by_task[task] = by_task.get(task, NONE) + accuracy
        total = overall(by_task)
        return {
            "eval/accuracy": total.value,
            "eval/standard_error": total.standard_error,
            **{f"eval/accuracy/{task}": by_task[task].value for task in sorted(by_task)},
        }

    def save(self) -> None:
        """Write a checkpoint; with trainer.async_save it is complete some steps later, or as run() ends."""
        common = {"step": self.step, "loader": self.loader.state()}
        with self.timer.phase("checkpoint"):
            self.store.begin(self.step, lambda folder: self.learner.begin_save(folder, common))
            if not self.cfg.trainer.async_save:
                self.store.settle()

    def resume(self, step: int) -> None:
        common = self.learner.load(self.store.path(step))
        self.step = common["step"]
        self.loader.restore(common.get("loader", {}))
        self.engine.update_weights(policy_version=self.step)
        self.timer.take()  # start-up is no part of the next step

    def decode(self, tokens: Sequence[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _seed(self, step: int) -> int:
        """Of a step's draws on this replica. An engine counts on from it, so it is far from any other."""
        return hash((self.cfg.seed, step, self.layout.dp_rank)) % 2**63

    def _grade(self, texts: Sequence[str], answers: Sequence[str]) -> list[Verdict]:
        """Verdicts from the replica's leader, known to all its ranks."""
        return self.layout.broadcast_object(self.rewards.verdicts(texts, answers) if self.rewards else None)

    def _is_due(self, every: int) -> bool:
        """Whether something done `every` steps (0: never) is due; the last step is always due."""
        return self.step == self.cfg.trainer.steps or (every > 0 and self.step % every == 0)

    def _describe(
        self, rewarded: Sequence[Sequence[Trajectory]], failures: Sequence[str], plan: Schedule
    ) -> Metrics:
        """Means over all replicas of what was sampled and what the gate made of it."""
        rollouts = [t for group in rewarded for t in group]
        step = self.step - 1  # of the weights that were trained
        staleness = max((step - t.policy_version for t in rollouts), default=0)
        (staleness_max,) = self.layout.max_over_world([float(staleness)])
        tokens = sum(len(t.response_tokens) for t in rollouts)
        sums = self.layout.sum_over_data(
            [
                sum(t.reward for t in rollouts),
                len(rollouts),
                float(plan.pass_rate.sum()),
                plan.sft_fraction * len(rewarded),
                len(rewarded),
                tokens,
                len(plan.trajectories),
                len(failures),
            ]
        )
        reward, count, pass_rate, sft, questions, tokens_rollout, trained, failed = sums
        sampled: Metrics = {}
        if count:
            sampled = {
                "reward": reward / count,
                "reward_failed": failed / count,
                "pass_rate": pass_rate / questions,
                "response_length": tokens_rollout / count,
            }
        return {
            **sampled,
            "sft_fraction": sft / questions,
            "tokens_rollout": tokens_rollout,
            "trajectories": trained,
            "policy_version": self.step,
            "staleness_max": staleness_max,
        }
