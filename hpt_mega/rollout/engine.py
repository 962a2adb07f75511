"""The protocol every rollout engine keeps. What an engine is made of lives in its own file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class SamplingParams:
    """How responses are sampled. temperature 0 is greedy; `seed` fixes every draw, whatever the batching."""

    n: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop_tokens: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"n and max_new_tokens must be at least 1, given {self.n}, {self.max_new_tokens}"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature must be >= 0 and top_p in (0, 1], given {self.temperature}, {self.top_p}"
            )


@dataclass(frozen=True)
class Sample:
    """One sampled response: its tokens (a stop token included) and their log-probabilities.

    logp is taken at the sampling temperature, over the full vocabulary (before top-p truncation); greedy
    samples report temperature 1. policy_version is that of the oldest weights a token was drawn with.
    """

    tokens: tuple[int, ...]
    logp: tuple[float, ...]
    finished: bool  # ended by a stop token, not by the length limit
    policy_version: int


Collect = Callable[[], list[list[Sample]]]


class RolloutEngine(Protocol):
    """An engine serves one policy version at a time; its samples say which."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        """Sample `sampling.n` responses to each prompt; result[i][j] is the j-th response to prompt i."""
        ...

    def submit(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> Collect:
        """As generate, whose result the returned call waits for; meanwhile weights may be updated."""
        ...

    def update_weights(self, policy_version: int) -> dict[str, float]:
        """Serve the trainer's current weights as `policy_version`; returns what was measured on the way."""
        ...

    def sleep(self) -> None:
        """Give back memory that training can use; nothing may be asked before the next update_weights."""
        ...

    def close(self) -> None:
        """End what the engine started."""
        ...


class EngineError(RuntimeError):
    """An engine that did not do what it was asked; says which, what, and the end of its log."""
