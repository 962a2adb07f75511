"""The states of several engines and of the requests dealt to them: a pure machine, time is an argument.

What starts, asks and updates the engines is in dispatch.py.

    DEAD --begin_start--> STARTING --started--> STALE --begin_update--> UPDATING --verified--> READY

    UPDATING --rejected--> STALE   its weights are not the trainer's: again, a bounded number of times
    READY ---announce----> STALE   the trainer has newer weights
    READY ------rest-----> STALE   the trainer wants the memory
    any but DEAD --failed--> DEAD  it died, took the weights by half, or a deadline found it wanting

The transitions that are missing are the point:

- Nothing but UPDATING leads to READY. An engine that starts holds the weights of its folder, and one that
  came back may hold any: both would answer, promptly and wrongly, for a version that they do not have.
- UPDATING does not lead back to READY at the old version: half of the old weights are overwritten by then.
- DEAD does not lead to STALE or UPDATING: a process that answers again after it was given up may be in the
  middle of anything. It is ended and started, and begins from nothing.
- READY does not lead to READY at a newer version: without a verified sync the version is a mere label.

What an engine says is heard only under the ticket it was asked with. A ticket ends with its answer or with
its engine's death or rejection, so that an answer which comes late (to a request that another engine has by
then) counts for nothing, and every request is answered once. An update does not end the tickets of requests:
they go on under the new weights. But an answer of an engine that is UPDATING must wait for the verdict on its
weights: part of it may have been drawn with them.
"""

from __future__ import annotations

import enum
import math
from collections import deque
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field


class State(enum.Enum):
    """Where an engine stands."""

    STARTING = "starting"
    STALE = "stale"
    UPDATING = "updating"
    READY = "ready"
    DEAD = "dead"


class TransitionError(RuntimeError):
    """A transition that the machine does not have: a fault of its driver."""


@dataclass(frozen=True)
class Limits:
    """Deadlines in seconds, and how often a thing is tried. Raises ValueError where one is not positive."""

    start_s: float
    update_s: float  # of one step of an update
    request_s: float
    silence_s: float  # without a sign of life from an engine that serves or waits
    backoff_s: float  # between a death and the next start; doubles with each further death in a row
    backoff_max_s: float
    failures: int  # deaths in a row without verified weights in between, then the engine is given up
    updates: int  # of one engine to one version, then the engine is refused
    attempts: int  # at one request, then the request is an error
    slots: int  # samples at once in an engine, above which it is dealt no further request

    def __post_init__(self) -> None:
        if wrong := [f"{name} = {value}" for name, value in vars(self).items() if not value > 0]:
            raise ValueError(f"the fleet's limits must be above 0, given {', '.join(wrong)}")

    def backoff(self, failures: int) -> float:
        """Seconds between the death number `failures` in a row and the next start."""
        return min(self.backoff_max_s, self.backoff_s * 2.0 ** min(failures - 1, 60))


@dataclass(frozen=True)
class Ticket:
    """One thing asked of one engine. `request` is None where it is a start or an update."""

    number: int
    engine: str
    request: Hashable | None


@dataclass
class _Engine:
    state: State = State.DEAD
    version: int | None = None
    task: Ticket | None = None  # the start or the update that is under way
    must_end_by: float = 0.0  # of the task; of the silence where there is none
    failures: int = 0  # in a row
    rejections: int = 0  # at the announced version
    start_at: float | None = 0.0  # None where it was given up
    dealt: dict[Ticket, float] = field(default_factory=dict)  # requests in flight and their deadlines
    why: str = ""
    log: str = ""


class FleetState:
    """The machine. `now` is in seconds of any clock that does not go back."""

    def __init__(self, engines: Sequence[str], limits: Limits) -> None:
        if not engines or len(set(engines)) < len(engines):
            raise ValueError(f"a fleet needs engines of different names, given {list(engines)}")
        self.limits = limits
        self._engines = {name: _Engine() for name in engines}
        self._target: int | None = None
        self._resting = False
        self._tickets = 0
        self._waiting: deque[Hashable] = deque()
        # of unanswered requests: the engine of each failed attempt, and why it failed
        self._attempts: dict[Hashable, list[tuple[str, str]]] = {}
        self._samples: dict[Hashable, int] = {}  # that an unanswered request is for

    # What is asked.

    def state(self, engine: str) -> State:
        return self._engines[engine].state

    def version(self, engine: str) -> int | None:
        """The verified version of an engine that is READY, else None."""
        return self._engines[engine].version

    def load(self, engine: str) -> int:
        """Samples that it was asked for and has not answered."""
        return sum(self._samples[ticket.request] for ticket in self._engines[engine].dealt)

    @property
    def target(self) -> int | None:
        """The version that is served, or on its way."""
        return self._target

    def is_current(self, ticket: Ticket) -> bool:
        """Whether an answer under this ticket would count."""
        engine = self._engines[ticket.engine]
        return engine.task == ticket or ticket in engine.dealt

    def must_wait(self, ticket: Ticket) -> bool:
        """Whether an answer under this ticket is not to be taken yet."""
        engine = self._engines[ticket.engine]
        return ticket in engine.dealt and engine.state is State.UPDATING

    def unanswered(self) -> set[Hashable]:
        return set(self._attempts)

    def wants_weights(self) -> list[str]:
        """Engines that are ready for an update."""
        return [
            name
            for name, engine in self._engines.items()
            if engine.state is State.STALE and self._target is not None and not self._refused(engine)
        ]

    def is_first_start(self) -> bool:
        """Whether an engine is on its way that has not failed yet: it is worth the wait."""
        return any(
            engine.state in (State.DEAD, State.STARTING) and not engine.failures
            for engine in self._engines.values()
        )

    def due(self, now: float) -> list[str]:
        """The engines to be started at this time."""
        return [
            name
            for name, engine in self._engines.items()
            if not self._resting
            and engine.state is State.DEAD
            and engine.start_at is not None
            and engine.start_at <= now
        ]

    def next_change(self) -> float | None:
        """When something comes due or expires, if nothing is heard before; None where nothing will."""
        times: list[float] = []
        for engine in self._engines.values():
            if engine.state is not State.DEAD:
                times += [engine.must_end_by]
                times += engine.dealt.values() if engine.state is not State.UPDATING else []
            elif engine.start_at is not None and not self._resting:
                times.append(engine.start_at)
        return min(times, default=None)

    def refused(self) -> list[str]:
        """Engines whose updates to the announced version all failed verification."""
        return [name for name, engine in self._engines.items() if self._refused(engine)]

    def has_hope(self) -> bool:
        """Whether some engine serves or may come to serve."""
        return any(
            not self._refused(engine) and (engine.state is not State.DEAD or engine.start_at is not None)
            for engine in self._engines.values()
        )

    def report(self) -> str:
        """Each engine's state, its last trouble and the end of its log."""
        lines: list[str] = []
        for name, engine in self._engines.items():
            served = f" at version {engine.version}" if engine.version is not None else ""
            given_up = engine.state is State.DEAD and engine.start_at is None
            lines.append(f"engine {name}: {engine.state.value}{served}" + (", given up" if given_up else ""))
            lines += [f"  {engine.why}"] if engine.why else []
            lines += [f"  | {line}" for line in engine.log.splitlines()]
        return "\n".join(lines)

    # The life of an engine.

    def begin_start(self, engine: str, now: float) -> Ticket:
        """The engine is being started. Raises TransitionError where it is not DEAD or not due."""
        if engine not in self.due(now):
            raise self._impossible(engine, "begin_start")
        return self._begin(engine, State.STARTING, now + self.limits.start_s)

    def started(self, ticket: Ticket, now: float) -> bool:
        """The engine answers. False where the ticket has ended: the news came late and counts for nothing."""
        engine = self._current(ticket)
        if engine is None or engine.state is not State.STARTING:
            return False
        self._settle(engine, State.STALE, now)
        return True

    def begin_update(self, engine: str) -> Ticket:
        """Weights go to the engine, step by step: it is late only when the others wait for it.

        Raises TransitionError where it is not STALE or nothing is announced.
        """
        if engine not in self.wants_weights():
            raise self._impossible(engine, "begin_update")
        return self._begin(engine, State.UPDATING, math.inf)

    def step_begins(self, ticket: Ticket, now: float) -> None:
        """The engine is asked for a step of its update."""
        if engine := self._current(ticket):
            engine.must_end_by = now + self.limits.update_s

    def step_ended(self, ticket: Ticket) -> None:
        """It has done it."""
        if engine := self._current(ticket):
            engine.must_end_by = math.inf

    def verified(self, ticket: Ticket, version: int, now: float) -> bool:
        """The engine was seen to hold the weights of `version`. True where it serves them from now on.

        Another version than the announced one leaves the engine STALE: newer weights are waiting.
        """
        engine = self._current(ticket)
        if engine is None or engine.state is not State.UPDATING:
            return False
        serves = version == self._target
        self._settle(engine, State.READY if serves else State.STALE, now)
        engine.version = version if serves else None
        engine.failures = engine.rejections = 0
        engine.why = engine.log = ""
        for request in engine.dealt:  # they were held still
            engine.dealt[request] = now + self.limits.request_s
        return serves

    def rejected(self, ticket: Ticket, why: str, log: str, now: float) -> bool:
        """The engine took the weights and failed their verification. False where the ticket has ended.

        Its requests wait again: part of them may have been drawn with these weights.
        """
        engine = self._current(ticket)
        if engine is None or engine.state is not State.UPDATING:
            return False
        self._settle(engine, State.STALE, now)
        self._take_back(engine)
        engine.rejections += 1
        engine.why, engine.log = why, log
        return True

    def heard(self, engine: str, now: float) -> None:
        """A sign of life. It moves no deadline of a start, an update or a request, and raises no dead."""
        one = self._engines[engine]
        if one.state in (State.STALE, State.READY):
            one.must_end_by = now + self.limits.silence_s

    def failed(self, engine: str, why: str, log: str, now: float) -> None:
        """The engine is dead. Its requests wait again, first in the line; its tickets have ended."""
        one = self._engines[engine]
        if one.state is State.DEAD:
            return
        for ticket in one.dealt:
            self._attempts[ticket.request].append((engine, f"{engine} died: {why}"))
        self._take_back(one)
        one.failures += 1
        one.start_at = (
            now + self.limits.backoff(one.failures) if one.failures < self.limits.failures else None
        )
        one.state, one.version, one.task, one.rejections = State.DEAD, None, None, 0
        one.why, one.log = why, log

    def overdue(self, now: float) -> list[tuple[str, str]]:
        """Engines that a deadline finds wanting, and which; the driver fetches their logs and fails them."""
        return [
            (name, why)
            for name, engine in self._engines.items()
            if engine.state is not State.DEAD and (why := self._overdue(engine, now))
        ]

    # Weights.

    def announce(self, version: int) -> None:
        """The trainer has the weights of `version`; whatever serves another version gets no new requests."""
        self._target, self._resting = version, False
        for engine in self._engines.values():
            engine.rejections = 0
            if engine.state is State.READY and engine.version != version:
                engine.state, engine.version = State.STALE, None

    def rest(self) -> None:
        """No engine serves or starts before the next announcement: their memory is the trainer's.

        Raises TransitionError where a request is unanswered.
        """
        if self._attempts:
            raise TransitionError(f"rest with {len(self._attempts)} unanswered requests")
        self._target, self._resting = None, True
        for engine in self._engines.values():
            if engine.state is State.READY:
                engine.state, engine.version = State.STALE, None

    # Requests.

    def submit(self, request: Hashable, samples: int = 1) -> None:
        """A new request, by an id of its own. Raises ValueError where the id is that of an unanswered one."""
        if request in self._attempts:
            raise ValueError(f"request {request!r} is unanswered; an id stands for one request")
        self._attempts[request] = []
        self._samples[request] = samples
        self._waiting.append(request)

    def deal(self, now: float) -> Ticket | None:
        """The first waiting request to the ready engine with the fewest samples; None where either lacks.

        Of the ready engines only those come into question that failed the request least: one that answers
        everything at once, and wrongly, would otherwise have it again and again.
        """
        loads = {
            name: self.load(name) for name, engine in self._engines.items() if engine.state is State.READY
        }
        if not any(load < self.limits.slots for load in loads.values()):
            return None
        for request in self._waiting:
            name = min(loads, key=lambda one: (self._failures(request, one), loads[one], one))
            if loads[name] < self.limits.slots:
                self._waiting.remove(request)
                ticket = self._ticket(name, request)
                self._engines[name].dealt[ticket] = now + self.limits.request_s
                return ticket
        return None

    def hopeless(self) -> dict[Hashable, str]:
        """Requests that were tried Limits.attempts times in vain, and why each attempt failed."""
        return {
            request: f"failed {len(failures)} times:\n" + "\n".join(f"  {why}" for _, why in failures)
            for request, failures in self._attempts.items()
            if len(failures) >= self.limits.attempts
        }

    def answered(self, ticket: Ticket, now: float) -> bool:
        """An answer that need not wait. True where it is the request's; False where it comes late."""
        engine = self._engines[ticket.engine]
        if engine.dealt.pop(ticket, None) is None:
            return False
        del self._attempts[ticket.request], self._samples[ticket.request]
        self.heard(ticket.engine, now)
        return True

    def returned(self, ticket: Ticket, why: str) -> None:
        """The request failed on an engine that lives; it waits again, first in the line.

        Where the engine is about to get weights, that ended the request: no attempt is counted.
        """
        engine = self._engines[ticket.engine]
        if engine.dealt.pop(ticket, None) is not None:
            if engine.state is State.READY:
                self._attempts[ticket.request].append((ticket.engine, f"{ticket.engine}: {why}"))
            self._waiting.appendleft(ticket.request)

    def cancel(self, requests: Iterable[Hashable]) -> None:
        """Forget these requests: their answers, if any come, are dropped."""
        gone = set(requests)
        self._waiting = deque(request for request in self._waiting if request not in gone)
        for engine in self._engines.values():
            for ticket in [one for one in engine.dealt if one.request in gone]:
                del engine.dealt[ticket]
        for request in gone:
            self._attempts.pop(request, None)
            self._samples.pop(request, None)

    # Parts.

    def _begin(self, name: str, state: State, must_end_by: float) -> Ticket:
        engine = self._engines[name]
        engine.state, engine.must_end_by = state, must_end_by
        engine.task = self._ticket(name, None)
        return engine.task

    def _settle(self, engine: _Engine, state: State, now: float) -> None:
        engine.state, engine.task, engine.must_end_by = state, None, now + self.limits.silence_s

    def _current(self, ticket: Ticket) -> _Engine | None:
        engine = self._engines[ticket.engine]
        return engine if engine.task == ticket else None

    def _ticket(self, engine: str, request: Hashable | None) -> Ticket:
        self._tickets += 1
        return Ticket(self._tickets, engine, request)

    def _failures(self, request: Hashable, engine: str) -> int:
        return sum(name == engine for name, _ in self._attempts[request])

    def _take_back(self, engine: _Engine) -> None:
        self._waiting.extendleft(ticket.request for ticket in reversed(engine.dealt))
        engine.dealt.clear()

    def _overdue(self, engine: _Engine, now: float) -> str:
        late = [ticket.request for ticket, by in engine.dealt.items() if by <= now]
        if late and engine.state is not State.UPDATING:
            return f"gave no answer to request {late[0]!r} within {self.limits.request_s:g} s"
        if engine.must_end_by > now:
            return ""
        return {
            State.STARTING: f"did not start within {self.limits.start_s:g} s",
            State.UPDATING: f"took over {self.limits.update_s:g} s for a step of its update",
        }.get(engine.state, f"gave no sign of life for {self.limits.silence_s:g} s")

    def _refused(self, engine: _Engine) -> bool:
        return engine.rejections >= self.limits.updates

    def _impossible(self, engine: str, what: str) -> TransitionError:
        return TransitionError(
            f"{what} of engine {engine}, which is {self.state(engine).value} (announced version: "
            f"{self._target})"
        )
