"""The served engine with servers that die, lie and fail to take weights, at each place where they can."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from hpt_mega.resharding.manifest import TransferError
from hpt_mega.rollout.engine import EngineError, Sample, SamplingParams
from hpt_mega.rollout.served import Probe, ServedEngine
from hpt_mega.trajectory import Source, Trajectory

SAMPLING = SamplingParams(n=1, max_new_tokens=4)
TEXT = Trajectory((1, 2), (3, 4, 5), group=0, source=Source.OFFLINE, policy_version=0)
TRAINER_LOGP = (-0.5, -1.0, -2.0)


class Alone:
    """The layout of a replica of one rank."""

    is_leader = True

    def broadcast_object(self, value: Any) -> Any:
        return value


class Sync:
    """Brings the server to the trainer's version, or fails as often as it is told."""

    path = ""
    plan = SimpleNamespace(nbytes=8)

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.sent: list[int] = []

    def send(self, engines: Sequence[Server], policy_version: int) -> None:
        self.sent.append(policy_version)
        if self.failures:
            self.failures -= 1
            raise TransferError("bucket 3 arrived damaged: lm_head.weight")
        for engine in engines:
            engine.version = policy_version

    def close(self) -> None: ...


class Server:
    """A server and its client; `script` says what becomes of each request for samples, in turn."""

    def __init__(self, script: Sequence[str] = (), gaps: Sequence[float] = ()) -> None:
        self.script, self.gaps = list(script), list(gaps)
        self.starts = 0
        self.version = -1
        self.running = False
        self.release = threading.Event()

    @property
    def client(self) -> Server:
        return self

    def start(self, deadline_s: float) -> None:
        self.starts += 1
        self.running, self.version = True, -1

    def connect(self, path: str, plan: object) -> None: ...

    def alive(self) -> str:
        return "" if self.running else "ended with exit code -9"

    def logp(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        gap = self.gaps.pop(0) if self.gaps else 0.0
        return [logp + gap for logp in TRAINER_LOGP]

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        fate = self.script.pop(0) if self.script else "answer"
        if fate == "die":
            self.running = False
            raise EngineError("engine 0 ended with exit code -9")
        if fate == "wait":
            assert self.release.wait(10)
        return [[Sample((7,), (-0.1,), True, self.version)] for _ in prompts]

    def close(self) -> None:
        self.running = False


def engine_of(server: Server, sync: Sync | None = None, bound: float = 0.1) -> ServedEngine:
    probe = Probe((TEXT,), lambda: [TRAINER_LOGP], bound)
    served = cast(Callable[..., ServedEngine], ServedEngine)(
        server, sync or Sync(), Alone(), probe, start_deadline_s=1.0
    )
    served.start(policy_version=0)
    return served


def versions(samples: list[list[Sample]]) -> list[int]:
    return [sample.policy_version for group in samples for sample in group]


def test_samples_carry_the_version_that_was_last_verified() -> None:
    engine = engine_of(server := Server())
    assert versions(engine.generate([(1,), (2,)], SAMPLING)) == [0, 0]
    measured = engine.update_weights(1)
    assert versions(engine.generate([(1,)], SAMPLING)) == [1]
    assert measured["sync/probe_gap"] == 0.0
    assert server.starts == 1


def test_a_server_that_dies_is_started_brought_to_the_weights_and_asked_again() -> None:
    engine = engine_of(server := Server(["die"]), sync := Sync())
    engine.update_weights(3)
    assert versions(engine.generate([(1,), (2,)], SAMPLING)) == [3, 3]
    assert server.starts == 2
    assert sync.sent == [0, 3, 3]


def test_a_server_that_dies_twice_ends_the_run_with_what_it_said() -> None:
    engine = engine_of(Server(["die", "die"]))
    with pytest.raises(EngineError, match="ended with exit code -9"):
        engine.generate([(1,)], SAMPLING)


def test_damaged_weights_are_sent_once_more_and_then_refused() -> None:
    engine = engine_of(Server(), sync := Sync())
    sync.failures = 1
    engine.update_weights(1)
    assert (engine.policy_version, sync.sent) == (1, [0, 1, 1])
    sync.failures = 2
    with pytest.raises(TransferError, match=r"damaged: lm_head.weight"):
        engine.update_weights(2)
    assert engine.policy_version == 1


def test_a_server_that_scores_otherwise_than_the_trainer_is_not_trusted() -> None:
    engine = engine_of(Server(gaps=[0.0, 0.3, 0.05]))
    assert engine.update_weights(1)["sync/probe_gap"] == pytest.approx(0.05)
    engine = engine_of(Server(gaps=[0.0, 0.3, -0.3]))
    with pytest.raises(EngineError, match=r"version 1 .* 3.0e-01 off the trainer.s .*probe_bound = 1.0e-01"):
        engine.update_weights(1)
    assert engine.policy_version == 0


def test_a_gap_that_is_no_number_is_beyond_any_bound() -> None:
    engine = engine_of(Server(gaps=[0.0, float("nan"), float("nan")]))
    with pytest.raises(EngineError, match="nan off the trainer's"):
        engine.update_weights(1)


def test_weights_are_updated_while_samples_are_drawn() -> None:
    engine = engine_of(server := Server(["wait"]))
    collect = engine.submit([(1,)], SAMPLING)
    engine.update_weights(1)
    server.release.set()
    assert versions(collect()) == [1]


def test_a_closed_engine_leaves_no_server() -> None:
    engine = engine_of(server := Server())
    engine.close()
    assert engine.health() == "ended with exit code -9"
    assert not server.running
