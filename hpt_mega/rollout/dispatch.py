"""Drives a fleet: threads that start and watch the engines and deal requests to them; updates begin and end.

What may happen when is decided in fleet.py alone; here it is carried out. How weights travel is not known.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Self

from hpt_mega.rollout.engine import EngineError, Sample, SamplingParams
from hpt_mega.rollout.fleet import FleetState, Limits, State, Ticket
from hpt_mega.rollout.handle import EngineClient, EngineHandle

LOG_LINES = 12
_LONGEST_WAIT_S = 1.0  # without a look at the clock
_FAREWELL_S = 20.0  # for the threads' end

Verify = Callable[[EngineClient], float]  # how far the engine is off the trainer; EngineError beyond a bound


class Intake:
    """One engine's side of an update: a Receiver that takes part until it fails, and says nothing then.

    So the others get their weights: what went wrong is told when the update ends. `step` surrounds each of
    its steps: only they count against the engine's deadline, not its wait for the others.
    """

    def __init__(
        self, ticket: Ticket, engine: EngineHandle, step: Callable[[], AbstractContextManager[None]]
    ):
        self.ticket = ticket
        self.wrong = ""
        self._engine = engine
        self._step = step

    def begin_update(self) -> None:
        self._try(lambda client: client.begin_update())

    def load(self, index: int, checksums: Sequence[str]) -> None:
        self._try(lambda client: client.load(index, checksums))

    def finish_update(self, policy_version: int) -> None:
        self._try(lambda client: client.finish_update(policy_version))

    def verify(self, how: Verify) -> tuple[float, str]:
        """What `how` finds, and what it raises, of an engine that has taken all."""
        try:
            with self._step():
                return how(self._engine.client), ""
        except EngineError as error:
            return math.nan, str(error)

    def _try(self, work: Callable[[EngineClient], None]) -> None:
        if not self.wrong:
            try:
                with self._step():
                    work(self._engine.client)
            except EngineError as error:
                self.wrong = str(error)


@dataclass
class _Batch:
    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    answers: dict[int, list[Sample]] = field(default_factory=dict)
    given_up: str = ""  # why


@dataclass(frozen=True)
class _Request:
    """A prompt of a batch."""

    batch: int
    index: int

    def __repr__(self) -> str:
        return f"prompt {self.index} of batch {self.batch}"


class Fleet:
    """Engines by name, served as one. Use as a context manager, or call close().

    The engines are started at once, and again when they die. `introduce` is called once for each started
    engine. heartbeat_s: between two looks whether an engine lives. Requests survive updates; updates come
    from one thread.
    """

    def __init__(
        self,
        engines: Mapping[str, EngineHandle],
        limits: Limits,
        heartbeat_s: float,
        introduce: Callable[[EngineClient], None] = lambda client: None,
    ) -> None:
        if not 0 < heartbeat_s < limits.silence_s:
            raise ValueError(
                f"heartbeat_s is {heartbeat_s}; above 0 and below silence_s = {limits.silence_s} is needed"
            )
        self._engines = dict(engines)
        self._state = FleetState(list(engines), limits)
        self._heartbeat_s = heartbeat_s
        self._introduce = introduce
        self._changed = threading.Condition()  # guards all that follows, and the state
        self._batches: dict[int, _Batch] = {}
        self._submitted = 0
        self._fault: BaseException | None = None  # of a thread of ours, raised by whoever waits
        self._closed = False
        self._keepers: dict[str, threading.Thread] = {}
        with self._changed:
            for name in engines:
                self._new_keeper(name)
        self._spawn(self._watch, "fleet watch")

    # Weights.

    def begin_update(self, policy_version: int | None, patience_s: float) -> list[Intake] | None:
        """The engines that take part in the update which the caller is about to stream; may be none.

        A policy_version announces new weights; None is for engines that came back and lack the current ones.
        Waits for an engine that starts for the first time, and for any where none would serve. None where
        that takes longer than patience_s: call again, with None. Raises EngineError, with every engine's
        state and log, where none is left or one failed its verification Limits.updates times.
        """
        until = time.monotonic() + patience_s
        with self._changed:
            if policy_version is not None:
                self._state.announce(policy_version)
            while True:
                if refused := self._state.refused():
                    raise self._error(f"weights of version {self._state.target} refused", refused)
                self._check_hope()
                wanting = self._state.wants_weights()
                if (wanting or self._ready()) and not self._state.is_first_start():
                    break
                if time.monotonic() > until:
                    return None
                self._wait()
            tickets = [self._state.begin_update(name) for name in wanting]
            return [Intake(one, self._engines[one.engine], partial(self._step, one)) for one in tickets]

    def end_update(self, intakes: Sequence[Intake], policy_version: int, verify: Verify) -> list[float]:
        """What `verify` found, for each engine that serves the streamed weights from now on.

        An engine that did not take all of them is ended and started anew; one that took them and fails
        verify gets them once more.
        """
        with ThreadPoolExecutor(max(1, len(intakes)), thread_name_prefix="verify") as pool:
            found = list(pool.map(lambda one: self._end_update(one, policy_version, verify), intakes))
        return [gap for gap in found if gap is not None]

    def sleep(self, patience_s: float) -> bool:
        """Have the engines give their memory back until weights are announced; none is started meanwhile.

        One that does not is ended. All requests must have been answered. False where an engine takes longer
        than patience_s for the start that it is in: call again.
        """
        until = time.monotonic() + patience_s
        with self._changed:
            self._state.rest()
            while any(self._state.state(name) is State.STARTING for name in self._engines):
                self._check_hope()
                if time.monotonic() > until:
                    return False
                self._wait()
            awake = [name for name in self._engines if self._state.state(name) is State.STALE]
        with ThreadPoolExecutor(len(self._engines), thread_name_prefix="sleep") as pool:
            list(pool.map(self._sleep, awake))
        return True

    def wants_weights(self) -> bool:
        """Whether an engine waits for weights that the others have."""
        with self._changed:
            return bool(self._state.wants_weights())

    # Rollouts.

    def submit(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> int:
        """Have `sampling.n` responses sampled to each prompt; returns the batch's number, for `wait`.

        Prompt i is sampled with seed sampling.seed + i * n, whichever engine has it and however often it is
        tried.
        """
        with self._changed:
            self._submitted += 1
            self._batches[self._submitted] = _Batch(prompts, sampling)
            for index in range(len(prompts)):
                self._state.submit(_Request(self._submitted, index), sampling.n)
            self._changed.notify_all()
            return self._submitted

    def wait(self, number: int, patience_s: float) -> list[list[Sample]] | None:
        """The batch's samples by prompt, once; None where they are not all there yet.

        Returns when they are, when an engine wants weights, or after patience_s. Raises EngineError where no
        engine is left or a prompt fails on one after the other.
        """
        until = time.monotonic() + patience_s
        with self._changed:
            batch = self._batches[number]
            while len(batch.answers) < len(batch.prompts):
                self._check_hope()
                if batch.given_up:
                    raise EngineError(batch.given_up)
                if time.monotonic() > until or self._state.wants_weights():
                    return None
                self._wait()
            del self._batches[number]
            return [batch.answers[index] for index in range(len(batch.prompts))]

    # The fleet's life.

    def health(self) -> str:
        """Empty when all engines serve; otherwise each engine's state and its last trouble."""
        with self._changed:
            return "" if self._ready() == len(self._engines) else self._state.report()

    def close(self) -> None:
        """End the engines. Further calls of close() do nothing."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            keepers = list(self._keepers.values())
            self._changed.notify_all()
        with ThreadPoolExecutor(len(self._engines), thread_name_prefix="close") as pool:
            list(pool.map(lambda engine: engine.close(), self._engines.values()))
        until = time.monotonic() + _FAREWELL_S
        for keeper in keepers:
            keeper.join(max(0.0, until - time.monotonic()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Threads.

    def _keep(self, name: str) -> None:
        """An engine's keeper: ends it when it is dead, starts it when due, looks after it else."""
        me, engine = threading.current_thread(), self._engines[name]
        look_at, ended = 0.0, False
        while True:
            with self._changed:
                if self._keepers[name] is not me:
                    return
                if self._closed:
                    break
                now = time.monotonic()
                state, ticket = self._state.state(name), None
                if name in self._state.due(now) and ended:
                    ticket = self._state.begin_start(name, now)
                elif (ended or state is not State.DEAD) and now < look_at:
                    self._changed.wait(min(look_at - now, _LONGEST_WAIT_S))
                    continue
            if ticket:
                ended = False
                self._start(ticket)
            elif state is State.DEAD and not ended:
                engine.close()
                ended = True
                continue
            elif state in (State.STALE, State.READY):
                self._look(name)
            look_at = time.monotonic() + self._heartbeat_s
        engine.close()  # one whose start met the fleet's end

    def _start(self, ticket: Ticket) -> None:
        engine = self._engines[ticket.engine]
        try:
            engine.start(self._state.limits.start_s)
            self._introduce(engine.client)
        except EngineError as error:
            self._fail(ticket, str(error))
            return
        with self._changed:
            self._state.started(ticket, time.monotonic())
            self._changed.notify_all()

    def _look(self, name: str) -> None:
        trouble = self._engines[name].alive()
        log = self._engines[name].log_tail(LOG_LINES) if trouble else ""
        with self._changed:
            if self._keepers[name] is not threading.current_thread():
                return
            if trouble:
                self._state.failed(name, trouble, log, time.monotonic())
            else:
                self._state.heard(name, time.monotonic())
            self._changed.notify_all()

    def _ask(self, ticket: Ticket, prompt: Sequence[int], sampling: SamplingParams, oldest: int) -> None:
        """Has one request answered. `oldest` is the version that the engine serves by now."""
        engine = self._engines[ticket.engine]
        try:
            (samples,) = engine.client.generate([prompt], sampling)
            found = [sample.policy_version for sample in samples]
            if len(found) != sampling.n or min(found) < oldest:
                raise EngineError(f"samples of versions {found}, expected {sampling.n} from {oldest} on")
        except EngineError as error:
            if trouble := engine.alive():
                self._fail(ticket, f"{trouble}; {error}")
                return
            with self._changed:
                self._state.returned(ticket, str(error))
                self._changed.notify_all()
            return
        with self._changed:
            while self._state.must_wait(ticket) and not self._closed:
                self._changed.wait(_LONGEST_WAIT_S)
            if self._state.answered(ticket, time.monotonic()):
                assert isinstance(ticket.request, _Request)
                self._batches[ticket.request.batch].answers[ticket.request.index] = samples
            self._changed.notify_all()

    def _watch(self) -> None:
        """Deals requests, and finds what is overdue.

        An engine that holds its keeper up gets another keeper, which ends it.
        """
        while True:
            with self._changed:
                if self._closed:
                    return
                self._give_up()
                while ticket := self._state.deal(time.monotonic()):
                    self._send(ticket)
                late = self._state.overdue(time.monotonic())
                if not late:
                    self._wait()
                    continue
            for name, why in late:
                log = self._engines[name].log_tail(LOG_LINES)
                with self._changed:
                    if (name, why) in self._state.overdue(time.monotonic()):
                        self._state.failed(name, why, log, time.monotonic())
                        self._new_keeper(name)
                        self._changed.notify_all()

    def _spawn(self, work: Callable[..., None], label: str, *arguments: object) -> threading.Thread:
        """A daemon thread; what it does not expect is raised by whoever waits for the fleet."""

        def run() -> None:
            try:
                work(*arguments)
            except BaseException as error:
                with self._changed:
                    self._fault = self._fault or error
                    self._changed.notify_all()

        thread = threading.Thread(target=run, name=label, daemon=True)
        thread.start()
        return thread

    # Parts, called with the lock held.

    def _wait(self) -> None:
        change = self._state.next_change()
        left = _LONGEST_WAIT_S if change is None else change - time.monotonic()
        self._changed.wait(min(max(left, 0.001), _LONGEST_WAIT_S))

    def _check_hope(self) -> None:
        if self._fault is not None:
            raise self._fault
        if self._closed:
            raise EngineError("the fleet was closed")
        if not self._state.has_hope():
            raise self._error("no engine is left", list(self._engines))

    def _give_up(self) -> None:
        """End the batches of which a prompt was tried too often; whoever waits for them is told."""
        for request, why in self._state.hopeless().items():
            assert isinstance(request, _Request)
            batch = self._batches[request.batch]
            batch.given_up = f"{request} {why}"
            self._state.cancel(_Request(request.batch, index) for index in range(len(batch.prompts)))
            self._changed.notify_all()

    def _send(self, ticket: Ticket) -> None:
        request, version = ticket.request, self._state.version(ticket.engine)
        assert isinstance(request, _Request) and version is not None
        batch = self._batches[request.batch]
        own = replace(batch.sampling, seed=batch.sampling.seed + request.index * batch.sampling.n)
        label = f"{ticket.engine}: {request}"
        self._spawn(self._ask, label, ticket, batch.prompts[request.index], own, version)

    def _ready(self) -> int:
        return sum(self._state.state(name) is State.READY for name in self._engines)

    def _new_keeper(self, name: str) -> None:
        self._keepers[name] = self._spawn(self._keep, f"{name} keeper", name)

    def _error(self, what: str, names: list[str]) -> EngineError:
        return EngineError(f"{what} ({', '.join(names)}):\n{self._state.report()}")

    # Parts, called without it: they ask engines.

    def _end_update(self, intake: Intake, policy_version: int, verify: Verify) -> float | None:
        """What verify found, where the engine serves from now on."""
        engine = self._engines[intake.ticket.engine]
        gap, rejected = (math.nan, "") if intake.wrong else intake.verify(verify)
        if wrong := intake.wrong or (rejected and engine.alive()):
            self._fail(intake.ticket, wrong)
            return None
        log = engine.log_tail(LOG_LINES) if rejected else ""
        with self._changed:
            now = time.monotonic()
            if rejected:
                self._state.rejected(intake.ticket, rejected, log, now)
            served = not rejected and self._state.verified(intake.ticket, policy_version, now)
            self._changed.notify_all()
        if rejected:
            with contextlib.suppress(EngineError):  # one that cannot will be found dead
                engine.client.abort()
        return gap if served else None

    def _sleep(self, name: str) -> None:
        try:
            self._engines[name].client.sleep()
        except EngineError as error:
            log = self._engines[name].log_tail(LOG_LINES)
            with self._changed:
                self._state.failed(name, str(error), log, time.monotonic())
                self._changed.notify_all()

    @contextlib.contextmanager
    def _step(self, ticket: Ticket) -> Iterator[None]:
        with self._changed:
            self._state.step_begins(ticket, time.monotonic())
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._state.step_ended(ticket)

    def _fail(self, ticket: Ticket, why: str) -> None:
        """The ticket's engine is dead, unless it has been given up since: it may be another one by now."""
        log = self._engines[ticket.engine].log_tail(LOG_LINES)
        with self._changed:
            if self._state.is_current(ticket):
                self._state.failed(ticket.engine, why, log, time.monotonic())
            self._changed.notify_all()
