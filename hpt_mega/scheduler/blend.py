"""HPT's blend: which rollouts and demonstrations of a step's questions are trained on, and how heavily.

The weights come from gate.py; what is computed from the trajectories lives in objective/.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpt_mega.trajectory import Question, Source, Trajectory


@dataclass(frozen=True, eq=False)
class Schedule:
    """The trajectories of one step and what the gate decided for each of its Q questions."""

    trajectories: list[Trajectory]
    pass_rate: Tensor  # [Q] fp64 mean reward of the rollouts
    alpha: Tensor  # [Q] weight of the rollouts
    beta: Tensor  # [Q] weight of the demonstration

    @property
    def sft_fraction(self) -> float:
        """Share of the questions whose demonstration is trained on; 0 for a step without questions."""
        return float((self.beta > 0).double().mean()) if len(self.beta) else 0.0


def schedule(
    trajectories: Sequence[Sequence[Trajectory]],
    questions: Sequence[Question],
    gate: Callable[[Tensor], tuple[Tensor, Tensor]],
    policy_version: int,
    pairs: bool = False,
    first_group: int = 0,
) -> Schedule:
    """Weigh the rollouts of each question by alpha(P), and add its demonstration with weight beta(P).

    trajectories: the rewarded rollouts of each question, in the order of `questions`, which are the groups
    from `first_group` on. A weight of 0 leaves the trajectories out. Rollouts keep their order; a
    demonstration follows those of its question. Where no question was sampled, all count as never solved.
    pairs: keep only the best and the worst of each question, as a pair; a question where all are alike has
    none (DPO, arXiv 2305.18290). A demonstration brings the response it is preferred to, where there is one.

    Raises ValueError, naming the question, where one has no rollouts or lacks a demonstration it needs.
    """
    if len(trajectories) != len(questions):
        raise ValueError(f"got rollouts for {len(trajectories)} questions and {len(questions)} questions")
    for question, rollouts in zip(questions, trajectories, strict=True):
        if not rollouts and any(trajectories):
            raise ValueError(
                f"question {question.id!r} has no rollouts, so no pass rate; sample at least one"
            )
    rates = [sum(rollout.reward for rollout in rollouts) / max(1, len(rollouts)) for rollouts in trajectories]
    pass_rate = torch.tensor(rates, dtype=torch.float64)
    alpha, beta = gate(pass_rate)
    blended: list[Trajectory] = []
    weights = zip(questions, trajectories, alpha.tolist(), beta.tolist(), strict=True)
    for group, (question, rollouts, a, b) in enumerate(weights, start=first_group):
        if a > 0:
            blended += [rollout.with_weight(a) for rollout in rollouts]
        if b > 0:
            better = demonstration(question, group, policy_version, weight=b)
            blended.append(better)
            if pairs and question.rejected_tokens:
                blended.append(replace(better, response_tokens=question.rejected_tokens, reward=0.0))
    return Schedule(best_and_worst(blended) if pairs else blended, pass_rate, alpha, beta)


def best_and_worst(trajectories: Sequence[Trajectory]) -> list[Trajectory]:
    """Of each question the first trajectory of the highest reward and the first of the lowest, as a pair with
    the weight of the better one."""
    groups: dict[int, list[Trajectory]] = {}
    for trajectory in trajectories:
        groups.setdefault(trajectory.group, []).append(trajectory)
    chosen: list[Trajectory] = []
    for number, members in groups.items():
        best = max(members, key=lambda t: t.reward)
        worst = min(members, key=lambda t: t.reward)
        if best.reward > worst.reward:
            chosen += [replace(best, pair=number), replace(worst, pair=number, weight=best.weight)]
    return chosen


def demonstration(question: Question, group: int, policy_version: int, weight: float = 1.0) -> Trajectory:
    """The question's demonstration as an offline trajectory, which counts as solved (reward 1).

    Raises ValueError, naming the question, where it has none.
    """
    if not question.demonstration_tokens:
        raise ValueError(
            f"question {question.id!r} has no demonstration, and the gate sends it to SFT; give it one, "
            "leave it out of the data, or choose a gate that never uses demonstrations (switch, threshold=-1)"
        )
    return Trajectory(
        prompt_tokens=question.prompt_tokens,
        response_tokens=question.demonstration_tokens,
        group=group,
        source=Source.OFFLINE,
        policy_version=policy_version,
        reward=1.0,
        weight=weight,
    )
