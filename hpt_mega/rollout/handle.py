"""What the fleet asks of an engine of its own: started, asked, given weights, ended. No engine lives here.

An engine that serves many ranks at once keeps the protocol of engine.py instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from hpt_mega.rollout.engine import Sample, SamplingParams

Bucket = Sequence[tuple[str, Tensor]]  # Hugging Face names and tensors, in the order in which they are sent


@dataclass(frozen=True)
class Receipt:
    """What an engine says it holds after an update: a checksum for each tensor, under the engine's names.

    An engine that fuses and splits tensors names and hashes its own, which then compare with those of an
    engine of the same kind and layout only.
    """

    policy_version: int
    checksums: Mapping[str, str]


class EngineHandle(Protocol):
    """One engine. Its methods raise EngineError, with the log's end, where the engine does not do as asked.

    Threads share a handle: generate may run many times at once, and is ended by abort, update and close.
    """

    def start(self, deadline_s: float) -> None:
        """Launch the engine, or find it where it runs already, and wait until it answers."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, policy_version: int
    ) -> list[list[Sample]]:
        """`sampling.n` samples a prompt, all by the weights of `policy_version`."""
        ...

    def update(self, buckets: Iterable[Bucket], policy_version: int) -> Receipt:
        """Replace the weights. Where it fails, nothing is served before the next update succeeds."""
        ...

    def alive(self) -> str:
        """Empty while the engine can do its work; else what is wrong. Has a deadline of its own."""
        ...

    def log_tail(self, lines: int) -> str:
        """The last lines of the engine's log."""
        ...

    def sleep(self) -> None:
        """Give the memory back; the weights are lost."""
        ...

    def wake(self) -> None:
        """Take the memory again; an update has to follow."""
        ...

    def abort(self) -> None:
        """End what is being generated."""
        ...

    def close(self) -> None:
        """End the engine; start may follow."""
        ...
