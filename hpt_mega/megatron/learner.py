"""Learning from a step's trajectories: scores what the algorithm asks for, splits, and updates the models.

Which trajectories there are is the trainer's and the scheduler's business.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hpt_mega.config import Config
from hpt_mega.data.balancing import plan_microbatches, share_prompts
from hpt_mega.data.packing import MicroBatch, collate, round_up
from hpt_mega.megatron.critic import Critic
from hpt_mega.megatron.model import PolicyModel
from hpt_mega.megatron.optimizer import (
    DataParallel,
    MegatronOptimizer,
    learning_rate,
    set_learning_rate,
    zero_gradients,
)
from hpt_mega.megatron.precision import tokens_multiple
from hpt_mega.megatron.runtime import Layout
from hpt_mega.megatron.saving import StateWriter
from hpt_mega.megatron.state import begin_save, load_state
from hpt_mega.megatron.step import Metrics, Objective, describe_update, forward_backward, score, update
from hpt_mega.objective import Estimator, TokenBatch
from hpt_mega.objective.metrics import added, means
from hpt_mega.trajectory import Trajectory

_PARTS = 4  # of a rank's work, at least: whole questions could not be dealt out evenly


@dataclass
class Learner:
    """The policy with all it learns with; every rank of the job calls the same methods together."""

    cfg: Config
    layout: Layout
    policy: DataParallel
    optimizer: MegatronOptimizer
    estimator: Estimator
    vocab_size: int
    reference: PolicyModel | None = None  # frozen; where the algorithm asks for ref_logp
    critic: Critic | None = None  # where it asks for values

    def learn(self, trajectories: Sequence[Trajectory], step: int) -> Metrics:
        """The updates of one step on the unified objective, over all replicas' trajectories.

        Each replica brings those of its questions; all of them know all, and share the work by its size.
        """
        rate = learning_rate(self.cfg.optimizer, step, self.cfg.trainer.steps)
        everyone = [t for replica in self.layout.gather_over_data(list(trajectories)) for t in replica]
        scored = self._score(everyone)
        advantages = self._advantages(scored)
        sums: list[Metrics] = []
        updates: list[Metrics] = []
        for part in self._parts(scored):
            own = advantages and [advantages[i] for i in part]
            found, described = self._update([scored[i] for i in part], own, rate)
            sums.append(found)
            updates.append(described)
        names = dict.fromkeys(name for one in updates for name in one)
        averages = {name: statistics.fmean(one[name] for one in updates if name in one) for name in names}
        counted = [name for name in ("tokens_trained", "skipped") if name in names]
        counts = {name: sum(one[name] for one in updates) for name in counted}
        return _trained_on(added(sums)) | averages | counts | {"lr": rate}

    def logprobs(self, trajectories: Sequence[Trajectory]) -> list[tuple[float, ...]]:
        """Log-probabilities of the response tokens under the current policy, on every rank of the replica."""
        return self._per_token(trajectories, self._logp_under(self.policy.module, temperature=1.0))

    def begin_save(self, folder: Path, common: dict[str, Any]) -> StateWriter:
        """Begin to write all that learning goes on from; `common` is small plain data."""
        return begin_save(
            folder, self.policy.module, self.optimizer, common, self.layout, self.cfg, self.critic
        )

    def load(self, folder: Path) -> dict[str, Any]:
        """Go on from what `begin_save` wrote; returns its `common`."""
        return load_state(folder, self.policy.module, self.optimizer, self.layout, self.cfg, self.critic)

    def _score(self, trajectories: Sequence[Trajectory]) -> list[Trajectory]:
        """The trajectories with the log-probabilities and values that the algorithm needs beforehand."""
        scored = list(trajectories)
        if self.cfg.trainer.updates_per_step > 1 or self.estimator.penalises_reward:
            found = self._per_token(scored, self._logp_under(self.policy.module))
            scored = [replace(t, old_logp=logp) for t, logp in zip(scored, found, strict=True)]
        if self.reference is not None:
            found = self._per_token(scored, self._logp_under(self.reference))
            scored = [replace(t, ref_logp=logp) for t, logp in zip(scored, found, strict=True)]
        if self.critic is not None:
            found = self._per_token(scored, self.critic.values)
            scored = [replace(t, values=values) for t, values in zip(scored, found, strict=True)]
        return scored

    def _logp_under(
        self, model: PolicyModel, temperature: float | None = None
    ) -> Callable[[Sequence[MicroBatch]], list[torch.Tensor]]:
        objective = self._objective(1.0)
        if temperature is not None:
            objective = replace(objective, temperature=temperature)

        def logp(microbatches: Sequence[MicroBatch]) -> list[torch.Tensor]:
            return score(model, microbatches, lambda *given: objective.logprobs(*given)[0], self.layout)

        return logp

    def _per_token(
        self,
        trajectories: Sequence[Trajectory],
        read: Callable[[Sequence[MicroBatch]], list[torch.Tensor]],
    ) -> list[tuple[float, ...]]:
        """One number a response token of each trajectory, in their order."""
        mine = self._plan(trajectories)
        microbatches = [self._collate([trajectories[i] for i in part]) for part in mine]
        own: dict[int, tuple[float, ...]] = {}
        for part, values_N in zip(mine, read(microbatches), strict=True):
            numbers = iter(values_N.tolist())
            for index in part:
                own[index] = tuple(next(numbers) for _ in trajectories[index].response_tokens)
        found = {index: row for rank in self.layout.gather_over_data(own) for index, row in rank.items()}
        return [found[index] for index in range(len(trajectories))]

    def _parts(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        """The indices of each update's trajectories: whole questions, dealt out in order."""
        groups = list(dict.fromkeys(t.group for t in trajectories))
        updates = self.cfg.trainer.updates_per_step
        part_of = {group: index * updates // len(groups) for index, group in enumerate(groups)}
        return [
            [i for i, t in enumerate(trajectories) if part_of[t.group] == part] for part in range(updates)
        ]

    def _update(
        self, trajectories: Sequence[Trajectory], advantages: Sequence[float] | None, rate: float
    ) -> tuple[Metrics, Metrics]:
        """One optimizer step; the sums of what it trained on, and what it did.

        Trajectories whose gradient is zero (a group that is all right or all wrong) count in the denominator
        but are not computed.
        """
        live = [
            i
            for i, t in enumerate(trajectories)
            if advantages is None or self.estimator.trains_on(advantages[i], t.weight)
        ]
        tokens = float(sum(len(trajectories[i]) for i in live))
        response_tokens = float(sum(len(trajectories[i].response_tokens) for i in live))
        question_tokens = Counter[int]()
        for t in trajectories:
            question_tokens[t.group] += len(t.response_tokens)
        microbatches = [
            self._collate(
                [trajectories[i] for i in part],
                advantages and [advantages[i] for i in part],
                [question_tokens[trajectories[i].group] for i in part],
            )
            for part in self._plan(trajectories, live)
        ]
        metrics: Metrics = {"tokens_trained": tokens}
        if self.critic is not None:
            metrics |= self.critic.learn(microbatches, response_tokens, self.estimator)
        zero_gradients(self.policy, self.optimizer)
        objective = self._objective(self._denominator(trajectories))
        sums = forward_backward(self.policy, microbatches, objective, self.layout)
        set_learning_rate(self.optimizer, rate)
        metrics |= {"loss": sums["sum/loss"]} | describe_update(self.optimizer, update(self.optimizer))
        return sums, metrics

    def _objective(self, denominator: float) -> Objective:
        temperature = self.cfg.rollout.temperature or 1.0
        return Objective(self.estimator, denominator or 1.0, temperature, self.vocab_size)

    def _plan(self, trajectories: Sequence[Trajectory], live: Sequence[int] | None = None) -> list[list[int]]:
        """Indices by micro-batch of this replica, equally many on every one; a pair is never split."""
        chosen = range(len(trajectories)) if live is None else live
        parallel, budget = self.cfg.parallel, self.cfg.trainer.tokens_per_microbatch
        count_multiple = parallel.pp if parallel.vpp > 1 else 1
        segment, _ = self._multiples
        given = [trajectories[i] for i in chosen]
        lengths = [round_up(len(t), segment) for t in given]
        together = [t.pair for t in given] if any(t.pair >= 0 for t in given) else None
        if self.policy.module.shares_prompts:
            fewest = parallel.dp * count_multiple  # micro-batches
            most = budget if fewest == 1 else min(budget, sum(lengths) // (_PARTS * fewest))
            lengths, together = share_prompts(given, most)
        plan = plan_microbatches(
            lengths,
            budget,
            parallel.dp,
            quadratic=self.policy.module.attention_share(),
            count_multiple=count_multiple,
            together=together,
        )
        return [[chosen[i] for i in part] for part in plan[self.layout.dp_rank]]

    @property
    def _multiples(self) -> tuple[int, int]:
        """What segments and rows are rounded up to: chunks of context, ranks of sequence parallelism, FP8."""
        parallel = self.cfg.parallel
        segment = 2 * parallel.cp if parallel.cp > 1 else 1
        share = parallel.cp * (parallel.tp if parallel.sequence_parallel else 1)  # of a row, on each rank
        return segment, math.lcm(segment, share * tokens_multiple(self.cfg.precision.fp8))

    def _collate(
        self,
        trajectories: Sequence[Trajectory],
        advantages: Sequence[float] | None = None,
        question_tokens: Sequence[int] | None = None,
    ) -> MicroBatch:
        segment, row = self._multiples
        return collate(
            trajectories,
            advantages,
            question_tokens,
            segment_multiple=segment,
            row_multiple=row,
            share_prompts=self.policy.module.shares_prompts,
        )

    def _advantages(self, trajectories: Sequence[Trajectory]) -> list[float] | None:
        """One a trajectory, taken over the whole step; None for advantages by token."""
        if not self.estimator.advantage_per_sequence:
            return None
        if not trajectories:
            return []
        batch = self._token_batch(collate(trajectories))
        advantages: list[float] = self.estimator.advantages(
            torch.tensor([t.reward for t in trajectories], dtype=torch.float64),
            batch.require("group", "the advantage"),
            batch.source,
            self.estimator.kl_penalty(batch).sum(1) if self.estimator.penalises_reward else None,
        ).tolist()
        return advantages

    def _denominator(self, trajectories: Sequence[Trajectory]) -> float:
        if not trajectories:
            return 0.0
        return self.estimator.denominator(self._token_batch(collate(trajectories)))

    @staticmethod
    def _token_batch(batch: MicroBatch) -> TokenBatch:
        """What is known of the trajectories before their log-probabilities are computed."""
        return TokenBatch(
            logp=torch.zeros(batch.mask_BT.shape),
            mask=batch.mask_BT,
            old_logp=batch.old_logp_BT,
            ref_logp=batch.ref_logp_BT,
            group=batch.group_B,
            source=batch.source_B,
        )


def _trained_on(sums: Metrics) -> Metrics:
    """Means over all tokens that a step trained on; what is of no token is left out."""
    found = means(sums)
    if not (tokens := found.pop("tokens")):
        return {}
    del found["sequences"]
    metrics = {"entropy": found.pop("entropy"), **{f"objective/{name}": x for name, x in found.items()}}
    if online := tokens - sums["sum/offline_tokens"]:
        metrics |= {"logp_gap_mean": sums["sum/logp_gap"] / online, "logp_gap_max": sums["max/logp_gap"]}
    return metrics
