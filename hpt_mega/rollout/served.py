"""Rollouts by servers: a replica's leader asks them, its ranks learn the answers and bring the weights.

A server is trusted with a policy version only after it scored known texts as the trainer does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from hpt_mega.megatron.runtime import Layout
from hpt_mega.resharding.manifest import TransferError
from hpt_mega.rollout.engine import EngineError, Sample, SamplingParams
from hpt_mega.rollout.sync import WeightSync
from hpt_mega.rollout.vllm import VLLMServer
from hpt_mega.trajectory import Trajectory

T = TypeVar("T")


@dataclass(frozen=True)
class Probe:
    """Texts whose responses trainer and engine both score after each update."""

    texts: Sequence[Trajectory]
    trainer_logp: Callable[[], list[tuple[float, ...]]]  # all ranks call it together
    bound: float  # largest mean absolute difference of log-probabilities that is let pass


class ServedEngine:
    """A rollout engine made of servers; every rank of a replica calls the same methods together.

    `servers` are given on the replica's leader only.
    """

    def __init__(
        self,
        servers: Sequence[VLLMServer],
        sync: WeightSync,
        layout: Layout,
        probe: Probe,
        *,
        start_deadline_s: float,
    ) -> None:
        self._servers = list(servers)
        self._sync = sync
        self._layout = layout
        self._probe = probe
        self._start_deadline_s = start_deadline_s
        self._version = -1
        self._expected: list[float] = []  # the trainer's log-probabilities of the probe's responses

    @property
    def policy_version(self) -> int:
        return self._version

    def start(self, policy_version: int) -> None:
        """Start the servers and give them the trainer's weights."""
        self._together(self._start_servers)
        self.update_weights(policy_version)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        """As RolloutEngine.generate. A dead server is started anew, once; then EngineError, on all ranks."""
        for last in (False, True):
            try:
                samples = self._together(lambda: self._ask(prompts, sampling))
                return [[replace(s, policy_version=self._version) for s in group] for group in samples]
            except EngineError:
                if last:
                    raise
                self._together(self._revive)
                self._bring(self._version)
        raise AssertionError("unreachable")

    def update_weights(self, policy_version: int) -> dict[str, float]:
        """Send the trainer's weights and check that they are served; the whole job calls it together."""
        self._expected = [logp for text in self._probe.trainer_logp() for logp in text]
        return self._bring(policy_version)

    def _bring(self, policy_version: int) -> dict[str, float]:
        """The servers to the trainer's weights; once more, with servers started anew, where that fails.

        Only the ranks of this replica take part: another replica's servers may be well.
        """
        for last in (False, True):
            try:
                began = time.perf_counter()
                self._sync.send([s.client for s in self._servers], policy_version)
                sent = time.perf_counter()
                gap = self._verify(policy_version)
            except (EngineError, TransferError):
                if last:
                    raise
                self._together(self._revive)
            else:
                self._version = policy_version
                return {
                    "sync/send_s": sent - began,
                    "sync/verify_s": time.perf_counter() - sent,
                    "sync/gb_per_s": self._sync.plan.nbytes / (sent - began) / 1e9,
                    "sync/probe_gap": gap,
                }
        raise AssertionError("unreachable")

    def health(self) -> str:
        return "; ".join(f"{s.name}: {what}" for s in self._servers if (what := s.alive()))

    def close(self) -> None:
        for server in self._servers:
            server.close()
        self._sync.close()

    def _ask(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        return self._servers[0].client.generate(prompts, sampling)

    def _start_servers(self) -> None:
        for server in self._servers:
            server.start(self._start_deadline_s)
            server.client.connect(self._sync.path, self._sync.plan)

    def _revive(self) -> None:
        """Start the servers anew that do not answer."""
        for server in self._servers:
            if server.alive():
                server.start(self._start_deadline_s)
                server.client.connect(self._sync.path, self._sync.plan)

    def _verify(self, policy_version: int) -> float:
        """The servers' largest mean gap to the trainer. Raises EngineError beyond the bound."""
        found = self._together(lambda: [self._gap(server) for server in self._servers])
        if not max(found) <= self._probe.bound:
            raise EngineError(
                f"after the update to policy version {policy_version} the servers' log-probabilities are "
                f"{', '.join(f'{gap:.1e}' for gap in found)} off the trainer's on average, expected at most "
                f"rollout.server.probe_bound = {self._probe.bound:.1e}"
            )
        return max(found)

    def _gap(self, server: VLLMServer) -> float:
        found = [
            logp
            for text in self._probe.texts
            for logp in server.client.logp(text.prompt_tokens, text.response_tokens)
        ]
        return statistics.fmean(abs(a - b) for a, b in zip(found, self._expected, strict=True))

    def _together(self, work: Callable[[], T]) -> T:
        """The leader's result on every rank of the replica, or EngineError on every rank."""
        outcome: tuple[T | None, str] | None = None
        if self._layout.is_leader:
            try:
                outcome = work(), ""
            except EngineError as error:
                outcome = None, str(error)
        result, error_text = self._layout.broadcast_object(outcome)
        if error_text:
            raise EngineError(error_text)
        return result  # type: ignore[return-value]
