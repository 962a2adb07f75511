"""Rollouts by a server: a replica's leader asks it, all its ranks learn the answers and bring the weights.

A server is trusted with a policy version only after it scored known texts as the trainer does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from hpt_mega.megatron.runtime import Layout
from hpt_mega.resharding.manifest import TransferError
from hpt_mega.rollout.engine import Collect, EngineError, Sample, SamplingParams
from hpt_mega.rollout.sync import WeightSync
from hpt_mega.rollout.vllm import VLLMServer
from hpt_mega.trajectory import Trajectory

T = TypeVar("T")

_BATCHES_AT_ONCE = 16


@dataclass(frozen=True)
class Probe:
    """Texts whose responses trainer and engine both score after each update."""

    texts: Sequence[Trajectory]
    trainer_logp: Callable[[], list[tuple[float, ...]]]  # all ranks call it together
    bound: float  # largest mean absolute difference of log-probabilities that is let pass


class ServedEngine:
    """A rollout engine that is a server; every rank of a replica calls the same methods together.

    `server` is given on the replica's leader only.
    """

    def __init__(
        self,
        server: VLLMServer | None,
        sync: WeightSync,
        layout: Layout,
        probe: Probe,
        *,
        start_deadline_s: float,
    ) -> None:
        self._server = server
        self._sync = sync
        self._layout = layout
        self._probe = probe
        self._start_deadline_s = start_deadline_s
        self._threads = ThreadPoolExecutor(_BATCHES_AT_ONCE, thread_name_prefix="rollouts")
        self._version = -1
        self._expected: list[float] = []  # the trainer's log-probabilities of the probe's responses

    @property
    def policy_version(self) -> int:
        return self._version

    def start(self, policy_version: int) -> None:
        """Start the server and give it the trainer's weights."""
        self._together(self._start)
        self.update_weights(policy_version)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        return self.submit(prompts, sampling)()

    def submit(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> Collect:
        """As RolloutEngine.submit. A dead server is started anew and asked again, once; then EngineError."""

        def ask() -> Future[list[list[Sample]]]:
            return self._threads.submit(self._own().client.generate, prompts, sampling)

        asked = ask() if self._layout.is_leader else None

        def collect() -> list[list[Sample]]:
            try:
                return self._together(lambda: _result(asked))
            except EngineError:
                self._together(self._revive)
                self._bring(self._version)
                return self._together(lambda: _result(ask()))

        return collect

    def update_weights(self, policy_version: int) -> dict[str, float]:
        """Send the trainer's weights and check that they are served; the whole job calls it together."""
        self._expected = [logp for text in self._probe.trainer_logp() for logp in text]
        return self._bring(policy_version)

    def _bring(self, policy_version: int) -> dict[str, float]:
        """The server to the trainer's weights; once more, started anew where it is dead, where that fails.

        Only the ranks of this replica take part: the other replicas' servers may be well.
        """
        for last in (False, True):
            try:
                began = time.perf_counter()
                self._sync.send([self._server.client] if self._server else [], policy_version)
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
        return self._server.alive() if self._server else ""

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self._server:
            self._server.close()
        self._sync.close()

    def _start(self) -> None:
        self._own().start(self._start_deadline_s)
        self._own().client.connect(self._sync.path, self._sync.plan)

    def _revive(self) -> None:
        """Start the server anew where it does not answer."""
        if self._own().alive():
            self._start()

    def _verify(self, policy_version: int) -> float:
        """The server's mean gap to the trainer's log-probabilities. Raises EngineError beyond the bound."""
        gap = self._together(self._gap)
        if not gap <= self._probe.bound:
            raise EngineError(
                f"after the update to policy version {policy_version} the server's log-probabilities are "
                f"{gap:.1e} off the trainer's on average, expected at most rollout.server.probe_bound = "
                f"{self._probe.bound:.1e}"
            )
        return gap

    def _gap(self) -> float:
        client = self._own().client
        found = [
            logp
            for text in self._probe.texts
            for logp in client.logp(text.prompt_tokens, text.response_tokens)
        ]
        return statistics.fmean(abs(a - b) for a, b in zip(found, self._expected, strict=True))

    def _own(self) -> VLLMServer:
        assert self._server is not None  # asked for on the leader only
        return self._server

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


def _result(asked: Future[T] | None) -> T:
    assert asked is not None  # the leader's own
    return asked.result()
