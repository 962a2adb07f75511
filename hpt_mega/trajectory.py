"""The data that flows through a training step: questions in, trajectories out.

Only plain data lives here. Who makes it (rollout/, scheduler/) and who consumes it (objective/,
megatron/) live elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum


class Source(IntEnum):
    """Where a trajectory came from."""

    ONLINE = 0  # sampled by the policy, as it was at the trajectory's policy_version
    OFFLINE = 1  # a demonstration


@dataclass(frozen=True)
class Question:
    """One question with its gold answer and its demonstration, as text and as tokens."""

    id: str
    task: str
    prompt: str
    answer: str
    demonstration: str
    prompt_tokens: tuple[int, ...]
    demonstration_tokens: tuple[int, ...]  # ends with the stop token
    rejected_tokens: tuple[int, ...] = ()  # a response the demonstration is preferred to; ends likewise


@dataclass(frozen=True)
class Trajectory:
    """One response to one question, ready to be trained on.

    rollout_logp holds the engine's log-probability of each response token (offline: empty). weight is HPT's
    alpha (online) or beta (offline). The fields after it are filled in only where an algorithm asks for them.
    """

    prompt_tokens: tuple[int, ...]
    response_tokens: tuple[int, ...]
    group: int  # the question's index in the step's global batch
    source: Source
    policy_version: int
    rollout_logp: tuple[float, ...] = ()
    reward: float = 0.0
    weight: float = 1.0
    old_logp: tuple[float, ...] = ()  # of the policy before the step's first update, by the trainer
    ref_logp: tuple[float, ...] = ()  # of the frozen reference model
    values: tuple[float, ...] = ()  # the critic's estimate before each response token
    pair: int = -1  # of a better and a worse response to one question

    def __len__(self) -> int:
        return len(self.prompt_tokens) + len(self.response_tokens)

    def with_weight(self, weight: float) -> Trajectory:
        return replace(self, weight=weight)
