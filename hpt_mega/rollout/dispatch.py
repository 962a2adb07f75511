"""Drives a fleet: threads that start, watch and update the engines, and deal requests to them.

What may happen when is decided in fleet.py alone; here it is carried out.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from hpt_mega.rollout.engine import EngineError, Sample, SamplingParams
from hpt_mega.rollout.fleet import Action, FleetState, Limits, State, Ticket
from hpt_mega.rollout.handle import Bucket, EngineHandle, Receipt

LOG_LINES = 12
_LONGEST_WAIT_S = 1.0  # without a look at the clock


@dataclass(frozen=True)
class Weights:
    """The trainer's weights, to be had until the next update.

    buckets and verify are called once for each engine, in threads of the fleet and perhaps at the same time;
    again for an engine that comes back. verify sees what the engine says it holds and probes it, and returns
    what is wrong, or an empty string.
    """

    policy_version: int
    buckets: Callable[[], Iterable[Bucket]]
    verify: Callable[[EngineHandle, Receipt], str]


class Fleet:
    """Engines by name, served as one. Use as a context manager, or call close().

    heartbeat_s: between two looks whether an engine lives. One generate and one update run at a time;
    an update that meets a generate takes the requests in flight back, and they are sampled anew.
    """

    def __init__(self, engines: Mapping[str, EngineHandle], limits: Limits, heartbeat_s: float) -> None:
        if not 0 < heartbeat_s < limits.silence_s:
            raise ValueError(
                f"heartbeat_s is {heartbeat_s}; above 0 and below silence_s = {limits.silence_s} is needed"
            )
        self._engines = dict(engines)
        self._state = FleetState(list(engines), limits)
        self._heartbeat_s = heartbeat_s
        self._changed = threading.Condition()  # guards all that follows, and the state
        self._weights: Weights | None = None
        self._answers: dict[int, list[Sample]] = {}
        self._fault: BaseException | None = None  # of a thread of ours, raised by whoever waits
        self._closed = False
        self._keepers: dict[str, threading.Thread] = {}
        self._turn = threading.Lock()
        with self._changed:
            for name in engines:
                self._new_keeper(name)
        self._spawn(self._watch, "fleet watch")

    @property
    def policy_version(self) -> int | None:
        """The version that is served, or on its way."""
        return self._state.target

    def update(self, weights: Weights) -> dict[str, float]:
        """Bring every living engine to the weights, and see them verified.

        Returns when no engine is on its way and one at least serves; one that is dead by then gets the
        weights when it is back. Raises EngineError, with every engine's state and log, where none serves
        or one refused them Limits.updates times.
        """
        began = time.monotonic()
        with self._changed:
            self._weights = weights
            self._state.announce(weights.policy_version)
            self._changed.notify_all()
            while True:
                states = [self._state.state(name) for name in self._engines]
                if refused := self._state.refused():
                    raise self._error(f"weights of version {weights.policy_version} refused", refused)
                self._check_hope()
                if State.READY in states and not set(states) & {State.STALE, State.UPDATING, State.STARTING}:
                    break
                self._wait()
        return {"sync/s": time.monotonic() - began, "sync/engines": float(states.count(State.READY))}

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        """Sample `sampling.n` responses to each prompt; result[i][j] is the j-th response to prompt i.

        Prompt i is sampled with seed sampling.seed + i * n, whichever engine has it and however often it is
        tried. Raises EngineError where no engine is left or a prompt fails on one after the other.
        """
        with self._turn, self._changed:
            self._answers.clear()
            try:
                for index in range(len(prompts)):
                    self._state.submit(index)
                while self._state.unanswered():
                    self._check_hope()
                    if self._state.target is None:
                        raise EngineError("the fleet has no weights; call update before generate")
                    while ticket := self._state.deal(time.monotonic()):
                        self._send(ticket, prompts, sampling)
                    self._wait()
            except BaseException:
                self._state.cancel()
                for name in self._living():
                    self._spawn(self._abort, f"{name} abort", name)
                raise
            return [self._answers[index] for index in range(len(prompts))]

    def sleep(self) -> None:
        """All engines give their memory back and serve nothing; wake and update have to follow."""
        with self._changed:
            self._state.withdraw()
            self._weights = None
            while any(self._state.state(n) in (State.STARTING, State.UPDATING) for n in self._engines):
                self._wait()
            living = self._living()
        for name in living:
            self._do_or_fail(name, self._engines[name].sleep)

    def wake(self) -> None:
        """All engines take their memory again."""
        with self._changed:
            living = self._living()
        for name in living:
            self._do_or_fail(name, self._engines[name].wake)
        with self._changed:
            self._state.resume(time.monotonic())
            self._changed.notify_all()

    def health(self) -> str:
        """Empty when all engines serve; otherwise each engine's state and its last trouble."""
        with self._changed:
            ready = all(self._state.state(name) is State.READY for name in self._engines)
            return "" if ready else self._state.report()

    def close(self) -> None:
        """End the engines. Further calls of close() do nothing."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        for engine in self._engines.values():
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Threads.

    def _keep(self, name: str) -> None:
        """An engine's keeper: ends it when it is dead, starts and updates it when due, looks after it else.

        An engine is started in the thread that stays with it: the kernel may tie a child's life to it.
        """
        me, engine = threading.current_thread(), self._engines[name]
        look_at, ended = 0.0, False
        while True:
            with self._changed:
                if self._closed or self._keepers[name] is not me:
                    return
                now = time.monotonic()
                state, ticket, weights = self._state.state(name), None, self._weights
                action = dict(self._state.due(now)).get(name)
                if action is Action.START:
                    ticket = self._state.begin_start(name, now)
                elif action is Action.UPDATE and weights is not None:
                    ticket = self._state.begin_update(name, now)
                elif (ended or state is not State.DEAD) and now < look_at:
                    self._changed.wait(min(look_at - now, _LONGEST_WAIT_S))
                    continue
            if state is State.DEAD and not ended:
                engine.close()
                ended = True
            if ticket and action is Action.START:
                ended = False
                self._start(ticket)
            elif ticket and weights is not None:
                self._update(ticket, weights)
            elif state in (State.STALE, State.READY):
                self._look(name)
            look_at = time.monotonic() + self._heartbeat_s

    def _start(self, ticket: Ticket) -> None:
        engine = self._engines[ticket.engine]
        try:
            engine.start(self._state.limits.start_s)
        except EngineError as error:
            self._fail(ticket, str(error))
            return
        with self._changed:
            self._state.started(ticket, time.monotonic())
            self._changed.notify_all()

    def _update(self, ticket: Ticket, weights: Weights) -> None:
        engine = self._engines[ticket.engine]
        try:
            wrong = weights.verify(engine, engine.update(weights.buckets(), weights.policy_version))
        except EngineError as error:
            wrong = str(error)
            if engine.alive():
                self._fail(ticket, wrong)
                return
        log = engine.log_tail(LOG_LINES) if wrong else ""
        with self._changed:
            now = time.monotonic()
            if wrong:
                self._state.rejected(ticket, wrong, log, now)
            else:
                self._state.verified(ticket, weights.policy_version, now)
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

    def _ask(self, ticket: Ticket, prompt: Sequence[int], sampling: SamplingParams, version: int) -> None:
        engine = self._engines[ticket.engine]
        try:
            (samples,) = engine.generate([prompt], sampling, version)
            if len(samples) != sampling.n or any(sample.policy_version != version for sample in samples):
                found = [sample.policy_version for sample in samples]
                raise EngineError(f"samples of versions {found}, expected {sampling.n} of version {version}")
        except EngineError as error:
            if trouble := engine.alive():
                self._fail(ticket, f"{trouble}; {error}")
                return
            with self._changed:
                self._state.returned(ticket, str(error))
                self._changed.notify_all()
            return
        with self._changed:
            if self._state.answered(ticket, time.monotonic()):
                assert isinstance(ticket.request, int)
                self._answers[ticket.request] = samples
            self._changed.notify_all()

    def _watch(self) -> None:
        """Finds what is overdue. An engine that holds its keeper up gets another keeper, which ends it."""
        while True:
            with self._changed:
                if self._closed:
                    return
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

    def _send(self, ticket: Ticket, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> None:
        index, version = ticket.request, self._state.version(ticket.engine)
        assert isinstance(index, int) and version is not None
        own = replace(sampling, seed=sampling.seed + index * sampling.n)
        self._spawn(self._ask, f"{ticket.engine} request {index}", ticket, prompts[index], own, version)

    def _living(self) -> list[str]:
        return [name for name in self._engines if self._state.state(name) in (State.STALE, State.READY)]

    def _new_keeper(self, name: str) -> None:
        self._keepers[name] = self._spawn(self._keep, f"{name} keeper", name)

    def _error(self, what: str, names: list[str]) -> EngineError:
        return EngineError(f"{what} ({', '.join(names)}):\n{self._state.report()}")

    # Parts, called without it: they ask engines.

    def _fail(self, ticket: Ticket, why: str) -> None:
        log = self._engines[ticket.engine].log_tail(LOG_LINES)
        with self._changed:
            if self._state.is_current(ticket):
                self._state.failed(ticket.engine, why, log, time.monotonic())
            self._changed.notify_all()

    def _do_or_fail(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except EngineError as error:
            log = self._engines[name].log_tail(LOG_LINES)
            with self._changed:
                self._state.failed(name, str(error), log, time.monotonic())

    def _abort(self, name: str) -> None:
        with contextlib.suppress(EngineError):  # one that cannot will be found dead
            self._engines[name].abort()
