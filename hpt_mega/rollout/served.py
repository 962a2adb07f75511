"""Rollouts by a fleet of servers: a replica's leader asks them, all its ranks bring them the weights.

A server is trusted with a policy version only after it scored known texts as the trainer does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from hpt_mega.megatron.runtime import Layout
from hpt_mega.rollout.dispatch import Fleet, Intake
from hpt_mega.rollout.engine import Collect, EngineError, Sample, SamplingParams
from hpt_mega.rollout.handle import EngineClient
from hpt_mega.rollout.sync import WeightSync
from hpt_mega.trajectory import Trajectory

T = TypeVar("T")

_PATIENCE_S = 20.0  # of one wait of the other ranks for the leader, which then says that it still waits


@dataclass(frozen=True)
class Probe:
    """Texts whose responses trainer and engine both score after each update."""

    texts: Sequence[Trajectory]
    trainer_logp: Callable[[], list[tuple[float, ...]]]  # all ranks call it together
    bound: float  # largest mean absolute difference of log-probabilities that is let pass


class ServedEngine:
    """A rollout engine that is a fleet of servers; every rank of a replica calls the same methods together.

    `fleet` is given on the replica's leader only. `sleeps`: its memory is the trainer's during training. The
    weights come from all ranks of the replica, so a server that died and is back gets them where the ranks
    meet: at the next update, or when samples are collected.
    """

    def __init__(
        self, fleet: Fleet | None, sync: WeightSync, layout: Layout, probe: Probe, *, sleeps: bool = False
    ) -> None:
        self._fleet = fleet
        self._sleeps = sleeps
        self._sync = sync
        self._layout = layout
        self._probe = probe
        self._version = -1
        self._expected: list[float] = []  # the trainer's log-probabilities of the probe's responses
        self._intakes: list[Intake] = []  # on the leader, of the update that is under way

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        return self.submit(prompts, sampling)()

    def submit(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> Collect:
        """As RolloutEngine.submit. What a server that dies owes, others answer. EngineError: none is left."""
        number = self._fleet.submit(prompts, sampling) if self._fleet else 0

        def look(fleet: Fleet) -> tuple[list[list[Sample]] | None, bool]:
            return fleet.wait(number, _PATIENCE_S), fleet.wants_weights()

        def collect() -> list[list[Sample]]:
            while True:
                samples, weights_wanted = self._together(look)
                if samples is not None:
                    return samples
                if weights_wanted:
                    self._bring(None)

        return collect

    def update_weights(self, policy_version: int) -> dict[str, float]:
        """Send the trainer's weights and check that they are served; the whole job calls it together."""
        self._expected = [logp for text in self._probe.trainer_logp() for logp in text]
        if self._sleeps:
            torch.cuda.empty_cache()  # what training has taken and no longer uses is the servers' again
        began = time.perf_counter()
        sent_s, gaps = self._bring(policy_version)
        return {
            "sync/send_s": sum(sent_s),
            "sync/verify_s": time.perf_counter() - began - sum(sent_s),  # and wait for servers, if any
            "sync/gb_per_s": self._sync.plan.nbytes * len(sent_s) / sum(sent_s) / 1e9,
            "sync/probe_gap": max(gaps),
            "sync/engines": float(len(gaps)),
        }

    def _bring(self, announced: int | None) -> tuple[list[float], list[float]]:
        """Stream the weights until a server has them, and all that run; seconds a stream, gaps by server.

        Only the ranks of this replica take part: the other replicas' servers may be well. Raises EngineError.
        """
        version = self._version if announced is None else announced
        sent_s: list[float] = []
        gaps: list[float] = []
        while (count := self._together(partial(self._open, announced=announced))) != 0:
            announced = None
            if count is None:
                continue
            began = time.perf_counter()
            self._sync.send(self._intakes, version)
            sent_s.append(time.perf_counter() - began)
            gaps += self._together(lambda fleet: fleet.end_update(self._intakes, version, self._gap))
        self._version = version
        return sent_s, gaps

    def _open(self, fleet: Fleet, announced: int | None) -> int | None:
        """How many servers the weights are to be streamed to; None where that is not known yet."""
        found = fleet.begin_update(announced, _PATIENCE_S)
        self._intakes = found or []
        return None if found is None else len(found)

    def sleep(self) -> None:
        """Free the servers' memory where the config asks for it."""
        while self._sleeps and not self._together(lambda fleet: fleet.sleep(_PATIENCE_S)):
            pass

    def close(self) -> None:
        if self._fleet:
            self._fleet.close()
        self._sync.close()

    def _gap(self, client: EngineClient) -> float:
        """A server's mean gap to the trainer's log-probabilities. Raises EngineError beyond the bound."""
        found = [
            logp
            for text in self._probe.texts
            for logp in client.logp(text.prompt_tokens, text.response_tokens)
        ]
        gap = statistics.fmean(abs(a - b) for a, b in zip(found, self._expected, strict=True))
        if not gap <= self._probe.bound:
            raise EngineError(
                f"after the update its log-probabilities are {gap:.1e} off the trainer's on average; "
                f"rollout.server.probe_bound lets {self._probe.bound:.1e} pass"
            )
        return gap

    def _together(self, work: Callable[[Fleet], T]) -> T:
        """The result of the leader's fleet on every rank of the replica, or EngineError on every rank.

        Another error is raised on the leader as it is: the others are told of it, and do not wait.
        """
        outcome: tuple[T | None, str] | None = None
        fault: Exception | None = None
        if self._fleet is not None:
            try:
                outcome = work(self._fleet), ""
            except EngineError as error:
                outcome = None, str(error)
            except Exception as error:
                fault = error
                outcome = None, f"the replica's leader failed: {type(error).__name__}: {error}"
        result, error_text = self._layout.broadcast_object(outcome)
        if fault is not None:
            raise fault
        if error_text:
            raise EngineError(error_text)
        return result  # type: ignore[return-value]
