"""The fleet's driver with engines that die and hang at chosen instants. Every test ends by its deadlines."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from hpt_mega.resharding.planner import Plan
from hpt_mega.rollout.dispatch import Fleet, Verify
from hpt_mega.rollout.engine import EngineError, Sample, SamplingParams
from hpt_mega.rollout.exchange import reading
from hpt_mega.rollout.fleet import Limits
from hpt_mega.rollout.handle import EngineClient

pytestmark = pytest.mark.timeout(120)
LIMITS = Limits(
    start_s=20.0,
    update_s=20.0,
    request_s=20.0,
    silence_s=20.0,
    backoff_s=0.05,
    backoff_max_s=0.2,
    failures=3,
    updates=2,
    attempts=5,
    slots=6,  # two requests
)
SHORT_S = 1.0  # the deadline that a hang is to meet; the others are for a busy machine
SAMPLING = SamplingParams(n=3, max_new_tokens=5, seed=11)
PROMPTS = [[q, q + 1] for q in range(17)]
DIE, HANG, FREEZE = "die", "hang", "freeze"


@dataclass
class FakeEngine:
    """Answers with tokens that tell prompt, seed and weights; misbehaves at the n-th call of a kind."""

    name: str
    trouble: dict[tuple[str, int], str] = field(default_factory=dict)  # (method, which call) -> what happens
    damage: Callable[[int], int] = lambda update: 0  # added to the weights of the n-th update
    version: int = -1
    calls: dict[str, int] = field(default_factory=dict)
    served: list[int] = field(default_factory=list)  # prompts, by their first token
    running: bool = False
    frozen: bool = False  # all of it, as by SIGSTOP
    weights: int = -1
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def meet(self, method: str) -> int:
        """Counts the call; dies or hangs where it is to."""
        with self.lock:
            self.calls[method] = self.calls.get(method, 0) + 1
            count = self.calls[method]
        ended = self.ended
        trouble = self.trouble.get((method, count)) or self.trouble.get((method, 0))
        if trouble in (HANG, FREEZE):
            self.frozen = trouble == FREEZE
            ended.wait(50.0)
        if trouble:
            if self.ended is ended:
                self.running = False
            raise EngineError(f"engine {self.name} broke in {method}")
        return count

    def start(self, deadline_s: float) -> None:
        self.ended, self.frozen = threading.Event(), False
        self.meet("start")
        self.running, self.weights = True, -1

    @property
    def client(self) -> FakeEngine:
        return self

    def connect(self, path: str, plan: Plan) -> None: ...

    def logp(self, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
        return [float(self.weights)]

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        weights, policy_version = self.weights, self.version
        self.meet("generate")
        time.sleep(0.01)
        if not self.running:
            raise EngineError(f"engine {self.name} is gone")
        self.served += [prompt[0] for prompt in prompts]
        return [
            [
                Sample((*prompt, sampling.seed + i * sampling.n + j, weights), (), True, policy_version)
                for j in range(sampling.n)
            ]
            for i, prompt in enumerate(prompts)
        ]

    def begin_update(self) -> None:
        self.weights = -2
        self.meet("begin_update")

    def load(self, index: int, checksums: Sequence[str]) -> None:
        self.weights = int(checksums[0]) + self.damage(self.meet("load"))

    def finish_update(self, policy_version: int) -> None:
        self.meet("finish_update")
        self.version = policy_version

    def alive(self) -> str:
        if self.frozen:
            self.ended.wait(50.0)
        return "" if self.running else "ended with exit code 9"

    def log_tail(self, lines: int) -> str:
        return f"{self.name}: the last line"

    def abort(self) -> None:
        self.meet("abort")

    def close(self) -> None:
        self.meet("close")
        self.running = False
        self.ended.set()


def holds(version: int) -> Verify:
    """Weights of a version are the number 100 * version."""

    def verify(client: EngineClient) -> float:
        (found,) = client.logp((), ())
        if found != 100 * version:
            raise EngineError(f"holds {found:g}, expected {100 * version}")
        return 0.0

    return verify


class Trainer:
    """Brings a fleet its weights as the ranks of a replica do, and collects what it asks for."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.version = 0
        self.streams: list[int] = []  # how many engines took part

    def update(self, version: int) -> None:
        self.version = version
        self.bring(version)

    def bring(self, announced: int | None, verify: Verify | None = None) -> None:
        while (intakes := self.fleet.begin_update(announced, 5.0)) != []:
            announced = None
            if intakes is None:
                continue
            self.streams.append(len(intakes))
            for intake in intakes:
                intake.begin_update()
                intake.load(0, [str(100 * self.version)])
                intake.finish_update(self.version)
            self.fleet.end_update(intakes, self.version, verify or holds(self.version))

    def collect(self, number: int) -> list[list[Sample]]:
        while (samples := self.fleet.wait(number, 5.0)) is None:
            if self.fleet.wants_weights():
                self.bring(None)
        return samples

    def generate(self, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[Sample]]:
        return self.collect(self.fleet.submit(prompts, SAMPLING))


def expected(version: int) -> list[list[Sample]]:
    """By the contract: prompt i with seeds from seed + i * n, and the weights of the version."""
    return [
        [Sample((*p, SAMPLING.seed + 3 * i + j, 100 * version), (), True, version) for j in range(3)]
        for i, p in enumerate(PROMPTS)
    ]


def fleet_of(*engines: FakeEngine, limits: Limits = LIMITS) -> Fleet:
    return Fleet({engine.name: engine for engine in engines}, limits, heartbeat_s=0.05)


def test_prompts_are_dealt_over_the_engines_and_answered_in_order() -> None:
    ash, elm = FakeEngine("ash"), FakeEngine("elm")
    with fleet_of(ash, elm) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        assert trainer.generate() == expected(1)
        assert fleet.health() == ""
    assert trainer.streams == [2]
    assert sorted(ash.served + elm.served) == list(range(17))
    assert min(len(ash.served), len(elm.served)) > 3
    assert not ash.running and not elm.running


def test_batches_wait_in_one_line_and_are_told_apart() -> None:
    with fleet_of(FakeEngine("ash"), FakeEngine("elm")) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        numbers = [fleet.submit(PROMPTS[:k], SAMPLING) for k in (3, 17, 0, 5)]
        for number, count in list(zip(numbers, (3, 17, 0, 5), strict=True))[::-1]:
            assert trainer.collect(number) == expected(1)[:count]


@pytest.mark.parametrize("how", [DIE, HANG])
@pytest.mark.parametrize("instant", [1, 2, 5])
def test_requests_of_an_engine_that_dies_or_hangs_are_answered_once_by_another(
    how: str, instant: int
) -> None:
    ash, elm = FakeEngine("ash", {("generate", instant): how}), FakeEngine("elm")
    with fleet_of(ash, elm, limits=replace(LIMITS, request_s=SHORT_S)) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        assert trainer.generate() == expected(1)


def test_an_engine_whose_process_answers_nothing_any_more_is_replaced() -> None:
    ash = FakeEngine("ash", {("generate", 4): FREEZE})
    with fleet_of(ash, limits=replace(LIMITS, silence_s=SHORT_S)) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        assert trainer.generate() == expected(1)
    assert ash.calls["start"] >= 2


def test_a_lone_engine_that_dies_comes_back_with_weights_before_it_serves() -> None:
    ash = FakeEngine("ash", {("generate", 4): DIE, ("generate", 11): HANG})
    with fleet_of(ash, limits=replace(LIMITS, request_s=SHORT_S)) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        trainer.update(2)
        assert trainer.generate() == expected(2)
    assert ash.calls["start"] >= 3 and ash.calls["load"] == ash.calls["start"] + 1


@pytest.mark.parametrize("how", [DIE, HANG])
@pytest.mark.parametrize("phase", ["start", "begin_update", "load", "finish_update"])
def test_an_engine_that_breaks_once_in_start_or_update_is_started_again(phase: str, how: str) -> None:
    ash = FakeEngine("ash", {(phase, 1): how})
    with fleet_of(ash, limits=replace(LIMITS, start_s=SHORT_S, update_s=SHORT_S)) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        assert trainer.generate() == expected(1)
    assert ash.calls["start"] == 2


@pytest.mark.parametrize("how", [DIE, HANG])
@pytest.mark.parametrize("phase", ["begin_update", "load", "finish_update"])
def test_an_engine_that_breaks_in_an_update_does_not_keep_the_others_from_theirs(
    phase: str, how: str
) -> None:
    ash, elm = FakeEngine("ash", {(phase, 1): how}), FakeEngine("elm")
    limits = replace(LIMITS, update_s=SHORT_S, backoff_s=20.0, backoff_max_s=20.0)
    with fleet_of(ash, elm, limits=limits) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        assert trainer.generate() == expected(1)
        assert "engine ash: dead" in fleet.health()
    assert trainer.streams == [2]
    assert ash.served == [] and sorted(elm.served) == list(range(17))


def test_an_engine_that_is_back_gets_the_current_weights_while_the_others_serve_on() -> None:
    ash, elm = FakeEngine("ash", {("generate", 2): DIE}), FakeEngine("elm")
    with fleet_of(ash, elm) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        while trainer.streams[-1] != 1:
            assert trainer.generate() == expected(1)
        trainer.update(2)
        assert trainer.generate() == expected(2)
        assert fleet.health() == ""
    assert trainer.streams == [2, 1, 2]


def test_no_engine_left_is_an_error_with_the_last_lines_of_their_logs() -> None:
    ash, elm = (
        FakeEngine("ash", {("start", 0): DIE}),
        FakeEngine("elm", {("generate", 0): DIE, ("start", 2): DIE}),
    )
    elm.trouble[("start", 3)] = DIE
    with fleet_of(ash, elm) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        with pytest.raises(EngineError) as raised:
            trainer.generate()
    assert "no engine is left (ash, elm)" in str(raised.value)
    for words in ("engine ash: dead, given up", "broke in start", "ash: the last line", "elm: the last line"):
        assert words in str(raised.value)


def test_weights_that_arrive_wrong_once_are_sent_again_to_that_engine_alone() -> None:
    ash, elm = FakeEngine("ash", damage=lambda update: 7 * (update == 1)), FakeEngine("elm")
    with fleet_of(ash, elm) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        assert trainer.generate() == expected(1)
    assert trainer.streams == [2, 1]
    assert ash.calls["load"] == 2 and ash.calls["start"] == 1 and ash.calls["abort"] == 1


def test_weights_that_never_arrive_right_stop_the_run_and_are_never_served() -> None:
    ash, elm = FakeEngine("ash", damage=lambda update: 7), FakeEngine("elm")
    with fleet_of(ash, elm) as fleet, pytest.raises(EngineError) as raised:
        Trainer(fleet).update(1)
    assert "weights of version 1 refused (ash)" in str(raised.value)
    assert "holds 107, expected 100" in str(raised.value)
    assert ash.served == [] and ash.calls["load"] == 2


class Held(FakeEngine):
    """Draws half of a response with the weights it has and the rest when it is let go."""

    let_go: threading.Event
    at_work: threading.Semaphore

    def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
        begun = self.version
        self.at_work.release()
        assert self.let_go.wait(20.0)
        return [[replace(s, policy_version=begun) for s in g] for g in super().generate(prompts, sampling)]


def held_engine(name: str, **more: object) -> Held:
    engine = Held(name, **more)  # type: ignore[arg-type]
    engine.let_go, engine.at_work = threading.Event(), threading.Semaphore(0)
    return engine


def test_requests_in_flight_go_on_under_new_weights_and_keep_the_version_they_began_with() -> None:
    ash = held_engine("ash")
    with fleet_of(ash) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        number = fleet.submit(PROMPTS[:2], SAMPLING)
        for _ in range(2):
            assert ash.at_work.acquire(timeout=20.0)
        trainer.update(2)
        ash.let_go.set()
        groups = trainer.collect(number)
    assert [[s.policy_version for s in group] for group in groups] == [[1] * 3] * 2
    assert all(s.tokens[-1] == 200 for group in groups for s in group)
    assert ash.calls["generate"] == 2


def test_what_was_drawn_with_weights_that_fail_verification_is_drawn_again() -> None:
    ash = held_engine("ash", damage=lambda update: 7 * (update == 2))
    with fleet_of(ash) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        number = fleet.submit(PROMPTS[:2], SAMPLING)
        for _ in range(2):
            assert ash.at_work.acquire(timeout=20.0)

        def verify(client: EngineClient) -> float:
            ash.let_go.set()
            while len(ash.served) < 2:
                time.sleep(0.005)
            time.sleep(0.1)  # the answers are there now, of weights that are about to be refused
            return holds(2)(client)

        trainer.version = 2
        trainer.bring(2, verify)
        groups = trainer.collect(number)
    assert all(s.tokens[-1] == 200 for group in groups for s in group)
    assert ash.calls["generate"] == 4


def test_a_late_failure_of_a_request_does_not_end_the_engine_that_was_started_since() -> None:
    """The request fails on the first engine; by the time it is told, a second one serves in its place."""
    told = threading.Event()

    class Slow(FakeEngine):
        def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
            if self.calls.get("start") == 1:
                assert told.wait(20.0)
                self.late = threading.current_thread()
                raise EngineError("the connection was reset")
            return super().generate(prompts, sampling)

        def alive(self) -> str:
            is_late = threading.current_thread() is getattr(self, "late", None)
            return "ended with exit code 9" if is_late else super().alive()

    ash = Slow("ash")
    with fleet_of(ash) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        number = fleet.submit(PROMPTS[:1], SAMPLING)
        while not any("ash: prompt" in thread.name for thread in threading.enumerate()):
            time.sleep(0.005)
        ash.running = False  # found by its keeper
        assert trainer.collect(number) == expected(1)[:1]
        told.set()
        while any("ash: prompt" in thread.name for thread in threading.enumerate()):
            time.sleep(0.005)
        assert fleet.health() == ""
        assert trainer.generate() == expected(1)
    assert ash.calls["start"] == 2


def test_a_prompt_that_every_engine_refuses_is_an_error_of_its_batch_alone() -> None:
    class Picky(FakeEngine):
        def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
            if prompts[0][0] == 5:
                raise EngineError("prompt is too long")
            return super().generate(prompts, sampling)

    with fleet_of(Picky("ash"), Picky("elm")) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        number, other = fleet.submit(PROMPTS, SAMPLING), fleet.submit(PROMPTS[:4], SAMPLING)
        wanted = r"prompt 5 of batch 1 failed 5 times:\n  (ash|elm): prompt is too long"
        with pytest.raises(EngineError, match=wanted):
            trainer.collect(number)
        assert trainer.collect(other) == expected(1)[:4]


def test_an_engine_that_answers_nonsense_leaves_the_prompts_to_the_other() -> None:
    class Proxied(FakeEngine):
        def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
            with reading("/generate", EngineError):
                self.served.append(prompts[0][0])
                answer: list[list[Sample]] = json.loads("<html>Bad gateway</html>")
                return answer

    ash, elm = Proxied("ash"), FakeEngine("elm")
    with fleet_of(ash, elm, limits=replace(LIMITS, attempts=2)) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        assert trainer.generate() == expected(1)
    assert sorted(elm.served) == list(range(17))
    assert 3 < len(ash.served) == len(set(ash.served))


def test_an_engine_that_is_long_in_starting_does_not_hold_up_those_who_wait_for_the_others_sleep() -> None:
    let_go = threading.Event()

    class Slow(FakeEngine):
        def start(self, deadline_s: float) -> None:
            if self.calls.get("start"):
                assert let_go.wait(20.0)
            super().start(deadline_s)

        def sleep(self) -> None:
            self.meet("sleep")

    ash, elm = Slow("ash"), Slow("elm")
    with fleet_of(ash, elm) as fleet:
        Trainer(fleet).update(1)
        ash.running = False
        while "ash: starting" not in fleet.health():
            time.sleep(0.005)
        began = time.monotonic()
        assert not fleet.sleep(0.2)
        assert time.monotonic() - began < 10.0
        let_go.set()
        while not fleet.sleep(0.2):
            pass
    assert ash.calls["sleep"] == elm.calls["sleep"] == 1


def test_a_sample_of_older_weights_than_its_engine_was_verified_with_is_refused() -> None:
    class Backward(FakeEngine):
        def generate(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[Sample]]:
            return [[replace(s, policy_version=0) for s in g] for g in super().generate(prompts, sampling)]

    with fleet_of(Backward("ash")) as fleet:
        trainer = Trainer(fleet)
        trainer.update(1)
        with pytest.raises(EngineError, match=r"samples of versions \[0, 0, 0\], expected 3 from 1 on"):
            trainer.generate()


def test_a_fault_of_the_programme_is_raised_where_the_fleet_is_waited_for() -> None:
    class Faulty(FakeEngine):
        def alive(self) -> str:
            raise ZeroDivisionError("in a look")

    with fleet_of(Faulty("ash")) as fleet:
        trainer = Trainer(fleet)
        number = fleet.submit(PROMPTS, SAMPLING)
        with pytest.raises(ZeroDivisionError, match="in a look"):
            trainer.collect(number)


def test_a_fleet_that_is_closed_while_an_engine_starts_leaves_none_running() -> None:
    class Slow(FakeEngine):
        def start(self, deadline_s: float) -> None:
            time.sleep(0.5)
            super().start(deadline_s)

    ash = Slow("ash")
    fleet = fleet_of(ash)
    while "ash keeper" not in {thread.name for thread in threading.enumerate()}:
        time.sleep(0.005)
    time.sleep(0.1)
    fleet.close()
    assert ash.calls["start"] == 1 and not ash.running


def test_a_heartbeat_slower_than_the_silence_it_breaks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"heartbeat_s is 20.0; above 0 and below silence_s = 20"):
        Fleet({"ash": FakeEngine("ash")}, LIMITS, heartbeat_s=20.0)
