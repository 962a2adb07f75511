"""The fleet's machine under any order of events, against a record kept by the test itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hpt_mega.rollout.fleet import FleetState, Limits, State, Ticket, TransitionError

NAMES = ("ash", "elm", "oak")
LIMITS = Limits(
    start_s=7.0,
    update_s=5.0,
    request_s=11.0,
    silence_s=3.0,
    backoff_s=0.5,
    backoff_max_s=6.0,
    failures=4,
    updates=2,
    attempts=1000,
    slots=3,
)


class AnyOrder(RuleBasedStateMachine):
    """Drives the machine as the real driver may, late and repeated news included."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.fleet = FleetState(NAMES, LIMITS)
        self.tasks: list[Ticket] = []  # starts and updates ever begun
        self.asked: list[Ticket] = []  # requests ever dealt
        self.sent: dict[Ticket, int] = {}  # version that an update carried
        self.holds: dict[str, int | None] = dict.fromkeys(NAMES)  # what was verified last, None if unsure
        self.answers: dict[int, int] = {}  # accepted answers by request
        self.submitted: set[int] = set()
        self.version = 0
        self.deaths = dict.fromkeys(NAMES, 0)  # in a row
        self.died_at: dict[str, float] = {}
        self.failed: Counter[tuple[object, str]] = Counter()  # attempts, by request and engine

    def some(self, data: st.DataObject, tickets: list[Ticket]) -> Ticket:
        """Mostly recent ones, so that much is current, and old ones too."""
        back = data.draw(st.integers(1, min(len(tickets), 12)))
        return tickets[-back]

    def in_flight(self) -> list[Ticket]:
        return [ticket for ticket in self.asked if self.fleet.is_current(ticket)]

    def die(self, name: str) -> None:
        if self.fleet.state(name) is not State.DEAD:
            self.deaths[name] += 1
            self.died_at[name] = self.now
            self.holds[name] = None
            self.failed.update((one.request, name) for one in self.in_flight() if one.engine == name)
        self.fleet.failed(name, "died", "its\nlog", self.now)

    @rule(step=st.sampled_from([0.125, 1.0, 2.5, 6.5]))
    def time_passes(self, step: float) -> None:
        self.now += step

    @rule(name=st.sampled_from(NAMES))
    def breath(self, name: str) -> None:
        before = self.fleet.state(name)
        self.fleet.heard(name, self.now)
        assert self.fleet.state(name) is before

    def start(self, name: str) -> Ticket:
        if name in self.died_at:
            waited = self.now - self.died_at[name]
            assert waited >= min(LIMITS.backoff_max_s, LIMITS.backoff_s * 2 ** (self.deaths[name] - 1))
        self.tasks.append(self.fleet.begin_start(name, self.now))
        return self.tasks[-1]

    def update(self, name: str) -> Ticket:
        self.tasks.append(self.fleet.begin_update(name))
        self.sent[self.tasks[-1]] = self.version
        self.holds[name] = None
        return self.tasks[-1]

    @rule(data=st.data())
    def carry_out_what_is_due(self, data: st.DataObject) -> None:
        starts, updates = self.fleet.due(self.now), self.fleet.wants_weights()
        if starts or updates:
            name = data.draw(st.sampled_from(starts + updates))
            self.start(name) if name in starts else self.update(name)

    @rule()
    def everything_due_goes_well(self) -> None:
        for name in self.fleet.due(self.now):
            assert self.fleet.started(self.start(name), self.now)
        for name in self.fleet.wants_weights():
            assert self.fleet.verified(self.update(name), self.version, self.now)
            self.holds[name] = self.version
            self.deaths[name] = 0

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def a_start_or_update_succeeds(self, data: st.DataObject) -> None:
        ticket = self.some(data, self.tasks)
        current = self.fleet.is_current(ticket)
        if ticket in self.sent:
            serves = self.fleet.verified(ticket, self.sent[ticket], self.now)
            assert not serves or current
            if current:
                self.deaths[ticket.engine] = 0
                self.holds[ticket.engine] = self.sent[ticket]
        else:
            assert self.fleet.started(ticket, self.now) == current

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def an_update_goes_step_by_step(self, data: st.DataObject) -> None:
        ticket = self.some(data, list(self.sent))
        if data.draw(st.booleans()):
            self.fleet.step_begins(ticket, self.now)
        else:
            self.fleet.step_ended(ticket)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def an_update_is_rejected(self, data: st.DataObject) -> None:
        self.fleet.rejected(self.some(data, list(self.sent)), "off by 1.4", "log", self.now)

    @rule(name=st.sampled_from(NAMES))
    def an_engine_dies(self, name: str) -> None:
        self.die(name)

    @rule()
    def deadlines_are_kept(self) -> None:
        for name, _ in self.fleet.overdue(self.now):
            self.die(name)
        assert not self.fleet.overdue(self.now)

    @rule(newer=st.booleans())
    def weights_are_announced(self, newer: bool) -> None:
        self.version += newer
        self.fleet.announce(self.version)

    @initialize(ready=st.booleans())
    def begin(self, ready: bool) -> None:
        if ready:
            self.fleet.announce(self.version)
            self.a_busy_moment(5)

    @rule(count=st.integers(1, 7))
    def a_busy_moment(self, count: int) -> None:
        """Without it the states that matter would be rare."""
        self.everything_due_goes_well()
        for _ in range(count):
            self.fleet.submit(len(self.submitted))
            self.submitted.add(len(self.submitted))
        self.requests_are_dealt(count)

    @rule(count=st.integers(1, 4))
    def requests_are_dealt(self, count: int) -> None:
        for _ in range(count):
            loads = {name: self.fleet.load(name) for name in NAMES if self.fleet.state(name) is State.READY}
            ticket = self.fleet.deal(self.now)
            if ticket is None:
                return
            assert self.fleet.state(ticket.engine) is State.READY
            assert self.holds[ticket.engine] == self.version == self.fleet.version(ticket.engine)
            order = {name: (self.failed[ticket.request, name], load) for name, load in loads.items()}
            assert order[ticket.engine] == min(order.values())
            self.asked.append(ticket)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def an_answer_comes(self, data: st.DataObject) -> None:
        ticket = self.some(data, self.asked)
        current = self.fleet.is_current(ticket)
        if self.fleet.must_wait(ticket):
            assert current and self.fleet.state(ticket.engine) is State.UPDATING
            return
        if self.fleet.answered(ticket, self.now):
            assert current
            assert self.holds[ticket.engine] is not None  # not of weights that nobody verified
            self.answers[ticket.request] = self.answers.get(ticket.request, 0) + 1

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def an_answer_is_an_error(self, data: st.DataObject) -> None:
        ticket = self.some(data, self.asked)
        is_attempt = self.fleet.is_current(ticket) and self.fleet.state(ticket.engine) is State.READY
        self.failed[ticket.request, ticket.engine] += is_attempt
        self.fleet.returned(ticket, "refused")

    @invariant()
    def every_request_is_answered_once_or_still_open(self) -> None:
        assert all(count == 1 for count in self.answers.values())
        assert self.submitted == set(self.answers) | self.fleet.unanswered()
        assert not set(self.answers) & self.fleet.unanswered()

    @invariant()
    def only_verified_weights_of_the_announced_version_are_served(self) -> None:
        for name in NAMES:
            served = self.fleet.version(name)
            assert (served is not None) == (self.fleet.state(name) is State.READY)
            assert served is None or served == self.holds[name] == self.fleet.target
            assert self.fleet.load(name) <= LIMITS.slots
            assert not self.fleet.load(name) or self.fleet.state(name) not in (State.DEAD, State.STARTING)

    @invariant()
    def a_dead_engine_comes_due_within_the_longest_backoff_unless_it_is_given_up(self) -> None:
        after = self.fleet.due(self.now + LIMITS.backoff_max_s)
        for name in NAMES:
            if self.fleet.state(name) is State.DEAD:
                assert (name in after) == (self.deaths[name] < LIMITS.failures)

    def teardown(self) -> None:
        """From anywhere, if engines behave from now on, every open request is answered."""
        self.version += 1
        self.fleet.announce(self.version)
        while self.fleet.has_hope() and self.fleet.unanswered():
            self.now += 1.0
            for name in NAMES:
                self.fleet.heard(name, self.now)
            for name, _ in self.fleet.overdue(self.now):  # what was never carried through above
                self.die(name)
            for name in NAMES:  # an update that nobody goes on with
                if self.fleet.state(name) is State.UPDATING:
                    self.die(name)
            for name in self.fleet.due(self.now):
                self.fleet.started(self.fleet.begin_start(name, self.now), self.now)
            for name in self.fleet.wants_weights():
                assert self.fleet.verified(self.fleet.begin_update(name), self.version, self.now)
            while ticket := self.fleet.deal(self.now):
                assert self.fleet.answered(ticket, self.now)
            assert self.now < 1e5


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=50)


def ready(limits: Limits = LIMITS, names: tuple[str, ...] = NAMES) -> FleetState:
    """A fleet that serves version 3 at time 0."""
    fleet = FleetState(names, limits)
    fleet.announce(3)
    for name in names:
        fleet.started(fleet.begin_start(name, 0.0), 0.0)
        assert fleet.verified(fleet.begin_update(name), 3, 0.0)
    return fleet


def test_an_engine_that_started_serves_nothing_before_its_weights_are_verified() -> None:
    fleet = FleetState(["ash"], LIMITS)
    fleet.submit(0)
    fleet.announce(3)
    fleet.started(fleet.begin_start("ash", 0.0), 1.0)
    assert fleet.deal(1.0) is None
    ticket = fleet.begin_update("ash")
    assert fleet.deal(1.0) is None
    assert fleet.verified(ticket, 3, 2.0)
    assert fleet.deal(2.0) == Ticket(3, "ash", 0)


def test_weights_announced_during_an_update_leave_the_engine_stale() -> None:
    fleet = FleetState(["ash"], LIMITS)
    fleet.announce(3)
    fleet.started(fleet.begin_start("ash", 0.0), 1.0)
    ticket = fleet.begin_update("ash")
    fleet.announce(4)
    assert not fleet.verified(ticket, 3, 2.0)
    assert fleet.state("ash") is State.STALE
    assert fleet.wants_weights() == ["ash"]


def test_news_of_a_start_or_an_update_that_was_given_up_counts_for_nothing() -> None:
    fleet = FleetState(["ash"], LIMITS)
    fleet.announce(3)
    slow = fleet.begin_start("ash", 0.0)
    fleet.failed("ash", "did not start", "", 7.0)
    again = fleet.begin_start("ash", 8.0)
    assert not fleet.started(slow, 8.0)
    assert fleet.started(again, 9.0)
    update = fleet.begin_update("ash")
    fleet.failed("ash", "died", "", 9.0)
    assert not fleet.verified(update, 3, 9.5)
    assert not fleet.rejected(update, "late", "", 9.5)
    assert fleet.state("ash") is State.DEAD


def test_the_answer_of_an_engine_thought_dead_is_dropped_and_that_of_its_successor_taken() -> None:
    fleet = ready()
    fleet.submit("q7")
    late = fleet.deal(0.0)
    assert late is not None
    fleet.failed(late.engine, "killed", "", 1.0)
    second = fleet.deal(1.0)
    assert second is not None and second.engine != late.engine
    assert not fleet.answered(late, 2.0)
    assert fleet.answered(second, 2.0)
    assert not fleet.answered(second, 2.0)


def test_an_engine_is_dealt_requests_until_their_samples_fill_its_slots() -> None:
    fleet = ready(replace(LIMITS, slots=8), ("ash", "elm"))
    for request, samples in enumerate((3, 8, 3, 1, 4, 1)):
        fleet.submit(request, samples)
    dealt = []
    while ticket := fleet.deal(0.0):
        dealt.append((ticket.engine, ticket.request))
    assert dealt == [("ash", 0), ("elm", 1), ("ash", 2), ("ash", 3), ("ash", 4)]
    assert (fleet.load("ash"), fleet.load("elm")) == (11, 8)
    fleet.cancel([4])
    ticket = fleet.deal(0.0)
    assert ticket is not None and (ticket.engine, ticket.request) == ("ash", 5)


def test_requests_of_a_dead_engine_go_first_and_in_their_order() -> None:
    fleet = ready(replace(LIMITS, slots=2), ("ash", "elm"))
    for request in range(7):
        fleet.submit(request)
    dealt = []
    while ticket := fleet.deal(0.0):
        dealt.append((ticket.engine, ticket.request))
    assert dealt == [("ash", 0), ("elm", 1), ("ash", 2), ("elm", 3)]
    fleet.failed("elm", "killed", "", 1.0)
    fleet.failed("ash", "killed", "", 1.0)
    fleet = replace_engines_ready(fleet)
    order = []
    while ticket := fleet.deal(9.0):
        order.append(ticket.request)
        fleet.answered(ticket, 9.0)
    assert order == [0, 2, 1, 3, 4, 5, 6]


def replace_engines_ready(fleet: FleetState) -> FleetState:
    for name in fleet.due(8.0):
        fleet.started(fleet.begin_start(name, 8.0), 8.0)
        fleet.verified(fleet.begin_update(name), 3, 8.0)
    return fleet


def test_requests_outlive_new_weights_and_their_deadline_begins_anew() -> None:
    fleet = ready(names=("ash",))
    fleet.submit("q7")
    ticket = fleet.deal(0.0)
    assert ticket is not None
    fleet.announce(4)
    update = fleet.begin_update("ash")
    assert fleet.must_wait(ticket) and fleet.overdue(11.0) == []
    fleet.verified(update, 4, 11.0)
    assert not fleet.must_wait(ticket)
    fleet.heard("ash", 21.9)
    assert fleet.overdue(21.9) == []
    assert fleet.answered(ticket, 21.9)


def test_requests_of_an_engine_whose_weights_are_rejected_wait_again_in_their_order() -> None:
    fleet = ready(names=("ash",))
    for request in range(5):
        fleet.submit(request)
    old = [fleet.deal(0.0) for _ in range(LIMITS.slots)]
    fleet.announce(4)
    fleet.rejected(fleet.begin_update("ash"), "1.4 off", "", 1.0)
    assert not any(fleet.answered(ticket, 1.0) for ticket in old if ticket)
    fleet.verified(fleet.begin_update("ash"), 4, 1.0)
    tickets = [fleet.deal(1.0) for _ in range(LIMITS.slots)]
    assert [ticket.request for ticket in tickets if ticket] == [0, 1, 2]
    assert fleet.hopeless() == {}


def test_a_request_that_an_update_ends_is_no_attempt() -> None:
    fleet = ready(replace(LIMITS, attempts=1), ("ash",))
    fleet.submit("q7")
    ticket = fleet.deal(0.0)
    assert ticket is not None
    fleet.announce(4)
    fleet.returned(ticket, "aborted")
    assert fleet.hopeless() == {} and fleet.unanswered() == {"q7"}


def test_the_weights_of_new_version_are_not_sent_to_an_engine_that_serves_it() -> None:
    fleet = ready(names=("ash", "elm"))
    fleet.failed("elm", "killed", "", 0.0)
    fleet.started(fleet.begin_start("elm", 1.0), 1.0)
    fleet.announce(3)
    assert fleet.wants_weights() == ["elm"]


def test_only_an_engine_that_never_failed_is_worth_waiting_for() -> None:
    fleet = FleetState(["ash", "elm"], LIMITS)
    assert fleet.is_first_start()
    for name in ("ash", "elm"):
        begun = fleet.begin_start(name, 0.0)
        assert fleet.is_first_start()
        fleet.started(begun, 1.0) if name == "ash" else fleet.failed(name, "no", "", 1.0)
    assert not fleet.is_first_start()


def test_an_engine_that_waits_for_the_others_is_not_late() -> None:
    fleet = FleetState(["ash"], LIMITS)
    fleet.announce(1)
    fleet.started(fleet.begin_start("ash", 0.0), 0.0)
    update = fleet.begin_update("ash")
    assert fleet.overdue(1000.0) == []
    fleet.step_begins(update, 1000.0)
    fleet.step_ended(update)
    assert fleet.overdue(2000.0) == []


@pytest.mark.parametrize(
    ("begun", "late_at", "words"),
    [("start", 7.0, "did not start within 7 s"), ("update", 5.0, "took over 5 s for a step of its update")],
)
def test_what_does_not_end_is_overdue_at_its_own_deadline(begun: str, late_at: float, words: str) -> None:
    fleet = FleetState(["ash"], LIMITS)
    fleet.announce(1)
    ticket = fleet.begin_start("ash", 0.0)
    if begun == "update":
        fleet.started(ticket, 0.0)
        fleet.step_begins(fleet.begin_update("ash"), 0.0)
    fleet.heard("ash", late_at - 0.1)  # a process that breathes is no excuse
    assert fleet.overdue(late_at - 0.1) == []
    assert fleet.overdue(late_at) == [("ash", words)]


def test_a_request_without_an_answer_makes_an_engine_overdue_although_it_breathes() -> None:
    fleet = ready(names=("ash",))
    fleet.submit("q7")
    fleet.deal(0.0)
    fleet.heard("ash", 10.9)
    assert fleet.next_change() == 11.0
    assert fleet.overdue(11.0) == [("ash", "gave no answer to request 'q7' within 11 s")]


def test_backoff_doubles_to_its_bound_and_verified_weights_end_it() -> None:
    assert [LIMITS.backoff(n) for n in (1, 2, 3, 4, 5, 6, 10_000)] == [0.5, 1.0, 2.0, 4.0, 6.0, 6.0, 6.0]
    fleet = FleetState(["ash"], LIMITS)
    fleet.announce(1)
    now = 0.0
    for wait in (0.5, 1.0, 2.0):
        fleet.begin_start("ash", now)
        fleet.failed("ash", "no", "", now)
        assert fleet.due(now + wait - 0.01) == []
        now += wait
        assert fleet.due(now) == ["ash"]
    fleet.started(fleet.begin_start("ash", now), now)
    fleet.verified(fleet.begin_update("ash"), 1, now)
    fleet.failed("ash", "no", "", now)
    assert fleet.due(now + 0.5) == ["ash"]


def test_an_engine_that_dies_too_often_is_given_up_and_the_report_holds_its_log() -> None:
    fleet = FleetState(["ash"], LIMITS)
    for death in range(LIMITS.failures):
        assert fleet.has_hope()
        fleet.begin_start("ash", 100.0 * death)
        fleet.failed("ash", "ended with exit code 9", "loading\nout of memory", 100.0 * death)
    assert not fleet.has_hope()
    assert fleet.due(1e9) == []
    assert fleet.report() == (
        "engine ash: dead, given up\n  ended with exit code 9\n  | loading\n  | out of memory"
    )


def test_an_engine_that_refuses_its_weights_is_not_asked_again_before_the_next_version() -> None:
    fleet = FleetState(["ash"], LIMITS)
    fleet.announce(1)
    fleet.started(fleet.begin_start("ash", 0.0), 0.0)
    for _ in range(LIMITS.updates):
        fleet.rejected(fleet.begin_update("ash"), "1.4 off", "", 0.0)
    assert fleet.refused() == ["ash"] and not fleet.has_hope() and fleet.wants_weights() == []
    fleet.announce(2)
    assert fleet.wants_weights() == ["ash"]


def test_a_request_that_fails_everywhere_is_an_error_that_tells_each_failure() -> None:
    fleet = ready(replace(LIMITS, attempts=2), ("ash", "elm"))
    fleet.submit("q7")
    first = fleet.deal(0.0)
    assert first is not None
    fleet.returned(first, "prompt too long")
    second = fleet.deal(0.0)
    assert second is not None
    fleet.failed(second.engine, "killed", "", 0.0)
    told = "failed 2 times:\n  ash: prompt too long\n  elm died: killed"
    assert fleet.hopeless() == {"q7": told}
    fleet.cancel(["q7"])
    assert fleet.deal(0.0) is None and fleet.unanswered() == set()


def test_a_request_goes_to_the_engine_that_failed_it_again_only_when_the_others_have_too() -> None:
    fleet = ready(replace(LIMITS, slots=1), ("ash", "elm"))
    for request in range(3):
        fleet.submit(request)
    dealt = []
    while ticket := fleet.deal(0.0):
        dealt.append((ticket.engine, ticket.request))
        if ticket.engine == "ash":
            fleet.returned(ticket, "nonsense")
        else:
            elm = ticket
    assert dealt == [("ash", 0), ("elm", 0), ("ash", 1), ("ash", 2)]  # those two wait for elm
    fleet.answered(elm, 0.0)
    fleet.failed("elm", "killed", "", 0.0)
    assert fleet.deal(0.0) == Ticket(elm.number + 3, "ash", 2)  # alone it has them again


def test_transitions_the_machine_does_not_have_are_errors() -> None:
    fleet = ready(names=("ash",))
    with pytest.raises(TransitionError, match="begin_start of engine ash, which is ready"):
        fleet.begin_start("ash", 0.0)
    with pytest.raises(TransitionError, match="begin_update of engine ash, which is ready"):
        fleet.begin_update("ash")


def test_an_id_stands_for_one_request_and_limits_are_positive() -> None:
    fleet = ready()
    fleet.submit(1)
    with pytest.raises(ValueError, match="an id stands for one request"):
        fleet.submit(1)
    with pytest.raises(ValueError, match="given slots = 0"):
        replace(LIMITS, slots=0)
    with pytest.raises(ValueError, match="different names"):
        FleetState(["ash", "ash"], LIMITS)
