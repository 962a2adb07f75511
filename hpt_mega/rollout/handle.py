"""What the fleet asks of an engine: its life (EngineHandle), and its work (EngineClient). None lives here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from hpt_mega.resharding.planner import Plan
from hpt_mega.resharding.transport import Receiver
from hpt_mega.rollout.engine import Sample, SamplingParams


class EngineClient(Receiver, Protocol):
    """What a running engine does. Raises EngineError, with the log's end, where it does not do as asked.

    Threads share a client: generate may run many times at once, and meets updates: what is in flight then
    goes on under the new weights, and says so in its samples' policy_version, or ends with EngineError.
    """

    def connect(self, path: str, plan: Plan) -> None:
        """Learn where the trainer's buckets are and what will come through them; once after each start."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        """`sampling.n` samples a prompt; prompt i is sampled with the seed sampling.seed + i * n."""
        ...

    def logp(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        """Log-probabilities of the response's tokens at temperature 1, under the engine's weights."""
        ...

    def abort(self) -> None:
        """End what is being generated; nothing is before the next update."""
        ...

    def sleep(self) -> None:
        """Give the GPU's memory back, weights and cache; begin_update takes it again."""
        ...


class EngineHandle(Protocol):
    """One engine, whether it runs or not."""

    @property
    def client(self) -> EngineClient:
        """Of the engine as it was last started. Raises EngineError where it was not."""
        ...

    def start(self, deadline_s: float) -> None:
        """Launch the engine, or find it where it runs already, and wait until it answers."""
        ...

    def alive(self) -> str:
        """Empty while the engine can do its work; else what is wrong. Has a deadline of its own."""
        ...

    def log_tail(self, lines: int) -> str:
        """The last lines of the engine's log."""
        ...

    def close(self) -> None:
        """End the engine; start may follow."""
        ...
