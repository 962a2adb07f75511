"""The served engine with servers that die, lie and fail to take weights, at each place where they can."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from hpt_mega.resharding.planner import Plan
from hpt_mega.rollout.dispatch import Fleet, Intake
from hpt_mega.rollout.engine import EngineError, Sample, SamplingParams
from hpt_mega.rollout.fleet import TransitionError
from hpt_mega.rollout.served import Probe, ServedEngine
from hpt_mega.trajectory import Source, Trajectory
from tests.rollout import test_dispatch

pytestmark = pytest.mark.timeout(60)
LIMITS = replace(test_dispatch.LIMITS, attempts=3, slots=4)
SAMPLING = SamplingParams(n=1, max_new_tokens=4)
TEXT = Trajectory((1, 2), (3, 4, 5), group=0, source=Source.OFFLINE, policy_version=0)
TRAINER_LOGP = (-0.5, -1.0, -2.0)


class Alone:
    """The layout of a replica of one rank."""

    is_leader = True

    def broadcast_object(self, value: Any) -> Any:
        return value


class Sync:
    """Brings the servers to the trainer's version."""

    path = ""
    plan = SimpleNamespace(nbytes=8)

    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []  # version and how many servers took part

    def send(self, engines: Sequence[Intake], policy_version: int) -> None:
        self.sent.append((policy_version, len(engines)))
        for engine in engines:
            engine.begin_update()
            engine.load(0, [])
            engine.finish_update(policy_version)

    def close(self) -> None: ...


class Server:
    """A server and its client; `fates` says what becomes of each of its calls of a kind, in turn."""

    def __init__(self, gaps: Sequence[float] = (), **fates: Sequence[str]) -> None:
        self.gaps = list(gaps)
        self.fates = {method: list(script) for method, script in fates.items()}
        self.starts = 0
        self.version = -1
        self.running = False
        self.release = threading.Event()

    def meet(self, method: str) -> None:
        script = self.fates.get(method, [])
        fate = script.pop(0) if script else "go on"
        if fate == "die":
            self.running = False
            raise EngineError(f"server was ended by signal 9 in {method}")
        if fate == "break":
            raise EngineError(f"server answered 500 to {method}: bucket 3 arrived damaged: lm_head.weight")
        if fate == "wait":
            assert self.release.wait(10)

    @property
    def client(self) -> Server:
        return self

    def start(self, deadline_s: float) -> None:
        self.starts += 1
        self.running, self.version = True, -1

    def connect(self, path: str, plan: Plan) -> None: ...

    def begin_update(self) -> None:
        self.meet("begin_update")

    def load(self, index: int, checksums: Sequence[str]) -> None:
        self.meet("load")

    def finish_update(self, policy_version: int) -> None:
        self.meet("finish_update")
        self.version = policy_version

    def alive(self) -> str:
        return "" if self.running else "was ended by signal 9"

    def logp(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        gap = self.gaps.pop(0) if self.gaps else 0.0
        return [logp + gap for logp in TRAINER_LOGP]

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        self.meet("generate")
        return [[Sample((*prompt, sampling.seed), (-0.1,), True, self.version)] for prompt in prompts]

    def abort(self) -> None: ...

    def sleep(self) -> None:
        self.meet("sleep")

    def log_tail(self, lines: int) -> str:
        return "its last line"

    def close(self) -> None:
        self.running = False


@contextmanager
def engine_of(
    *servers: Server, sleeps: bool = False, backoff_s: float = LIMITS.backoff_s
) -> Iterator[tuple[ServedEngine, Sync]]:
    """The engine, with version 0, and how often it was sent weights."""
    probe = Probe((TEXT,), lambda: [TRAINER_LOGP], bound=0.1)
    limits = replace(LIMITS, backoff_s=backoff_s, backoff_max_s=max(backoff_s, LIMITS.backoff_max_s))
    fleet = Fleet({str(number): server for number, server in enumerate(servers)}, limits, heartbeat_s=0.05)
    sync = Sync()
    engine = cast(Callable[..., ServedEngine], ServedEngine)(fleet, sync, Alone(), probe, sleeps=sleeps)
    try:
        engine.update_weights(0)
        yield engine, sync
    finally:
        engine.close()


def answers(version: int, *prompts: int) -> list[list[Sample]]:
    return [[Sample((p, i), (-0.1,), True, version)] for i, p in enumerate(prompts)]


def test_samples_carry_the_version_that_was_last_verified() -> None:
    with engine_of(server := Server()) as (engine, _):
        assert engine.generate([(1,), (2,)], SAMPLING) == answers(0, 1, 2)
        measured = engine.update_weights(1)
        assert engine.generate([(1,)], SAMPLING) == answers(1, 1)
    assert measured["sync/probe_gap"] == 0.0 and measured["sync/engines"] == 1
    assert server.starts == 1


def test_a_server_that_dies_is_started_brought_to_the_weights_and_asked_again() -> None:
    with engine_of(server := Server(generate=["die"])) as (engine, sync):
        engine.update_weights(3)
        assert engine.generate([(1,), (2,)], SAMPLING) == answers(3, 1, 2)
    assert server.starts == 2
    assert sync.sent == [(0, 1), (3, 1), (3, 1)]


def test_what_a_dying_server_owes_the_others_answer_and_no_weights_are_sent_for_it() -> None:
    with engine_of(dying := Server(generate=["die"]), Server(), backoff_s=20.0) as (engine, sync):
        prompts = [(q,) for q in range(9)]
        assert engine.generate(prompts, SAMPLING) == answers(0, *range(9))
        assert dying.starts == 1
    assert sync.sent == [(0, 2)]


def test_a_server_that_dies_again_and_again_ends_the_run_with_what_it_said() -> None:
    with (
        engine_of(Server(generate=["die"] * 9)) as (engine, _),
        pytest.raises(EngineError, match=r"prompt 0 of batch 1 failed 3 times:\n  0 died: was ended by sig"),
    ):
        engine.generate([(1,)], SAMPLING)


@pytest.mark.parametrize("step", ["begin_update", "load", "finish_update"])
@pytest.mark.parametrize("how", ["die", "break"])
def test_a_server_that_does_not_take_an_update_is_started_anew_and_gets_it_once_more(
    step: str, how: str
) -> None:
    with engine_of(server := Server(**{step: ["go on", how]})) as (engine, sync):
        engine.update_weights(1)
        assert engine.generate([(4,)], SAMPLING) == answers(1, 4)
    assert server.starts == 2
    assert sync.sent == [(0, 1), (1, 1), (1, 1)]


def test_weights_that_never_arrive_whole_end_the_run_with_what_was_damaged() -> None:
    with (
        engine_of(Server(load=["go on"] + ["break"] * 9)) as (engine, _),
        pytest.raises(EngineError, match=r"no engine is left \(0\)[\s\S]*damaged: lm_head.weight"),
    ):
        engine.update_weights(1)


def test_a_server_that_scores_otherwise_than_the_trainer_is_not_trusted() -> None:
    with engine_of(Server(gaps=[0.0, 0.3, 0.05])) as (engine, _):
        assert engine.update_weights(1)["sync/probe_gap"] == pytest.approx(0.05)
    wanted = r"version 1 refused \(0\)[\s\S]* 3.0e-01 off the trainer.s .*probe_bound lets 1.0e-01 pass"
    with (
        engine_of(Server(gaps=[0.0, 0.3, -0.3])) as (engine, _),
        pytest.raises(EngineError, match=wanted),
    ):
        engine.update_weights(1)


def test_a_gap_that_is_no_number_is_beyond_any_bound() -> None:
    with (
        engine_of(Server(gaps=[0.0, float("nan"), float("nan")])) as (engine, _),
        pytest.raises(EngineError, match="nan off the trainer's"),
    ):
        engine.update_weights(1)


def test_weights_are_updated_while_samples_are_drawn() -> None:
    with engine_of(server := Server(generate=["wait"])) as (engine, _):
        collect = engine.submit([(1,)], SAMPLING)
        engine.update_weights(1)
        server.release.set()
        assert collect() == answers(1, 1)


def test_servers_that_sleep_serve_again_with_new_weights_and_none_starts_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given_back: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given_back.append(1))
    well, stubborn = Server(), Server(sleep=["break"])
    with engine_of(well, stubborn, sleeps=True) as (engine, sync):
        engine.generate([(1,), (2,)], SAMPLING)
        engine.sleep()
        until = time.monotonic() + 20
        while stubborn.running and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(2 * LIMITS.backoff_s)
        assert (well.running, stubborn.running, stubborn.starts) == (True, False, 1)
        before = len(given_back)
        engine.update_weights(1)
        assert len(given_back) == before + 1
        assert sync.sent[-1][0] == 1
        assert engine.generate([(1,), (2,)], SAMPLING) == answers(1, 1, 2)
        engine.submit([(3,)], SAMPLING)
        with pytest.raises(TransitionError, match="rest with 1 unanswered"):
            engine.sleep()


def test_a_fault_on_the_leader_is_told_to_the_other_ranks_that_wait_for_it() -> None:
    told: list[Any] = []

    class Leader(Alone):
        def broadcast_object(self, value: Any) -> Any:
            told.append(value)
            return value

    with engine_of(Server()) as (engine, _):
        engine._layout = cast(Any, Leader())
        with pytest.raises(ZeroDivisionError):
            engine._together(lambda fleet: 1 // 0)
        assert told == [
            (None, "the replica's leader failed: ZeroDivisionError: integer division or modulo by zero")
        ]
        engine._fleet, others = None, engine._fleet
        engine._layout.broadcast_object = lambda value: told[0]  # type: ignore[method-assign]
        with pytest.raises(EngineError, match="the replica's leader failed: ZeroDivisionError"):
            engine._together(lambda fleet: 1)
        engine._fleet = others


def test_a_closed_engine_leaves_no_server() -> None:
    with engine_of(server := Server()):
        assert server.running
    assert not server.running
