"""The fleet's driver with engines that die and hang at chosen instants. Every test ends by its deadlines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from hpt_mega.rollout.dispatch import Fleet, Weights
from hpt_mega.rollout.engine import EngineError, Sample, SamplingParams
from hpt_mega.rollout.fleet import Limits
from hpt_mega.rollout.handle import Bucket, EngineHandle, Receipt

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
    slots=2,
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

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, policy_version: int
    ) -> list[list[Sample]]:
        weights = self.weights
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

    def update(self, buckets: Iterable[Bucket], policy_version: int) -> Receipt:
        self.weights = -2
        count = self.meet("update")
        for bucket in buckets:
            for _, tensor in bucket:
                self.weights = int(tensor) + self.damage(count)
        return Receipt(policy_version, {"w": str(self.weights)})

    def alive(self) -> str:
        if self.frozen:
            self.ended.wait(50.0)
        return "" if self.running else "ended with exit code 9"

    def log_tail(self, lines: int) -> str:
        return f"{self.name}: the last line"

    def sleep(self) -> None:
        self.meet("sleep")
        self.weights = -3

    def wake(self) -> None:
        self.meet("wake")

    def abort(self) -> None:
        self.meet("abort")

    def close(self) -> None:
        self.meet("close")
        self.running = False
        self.ended.set()


def weights(version: int) -> Weights:
    """Weights that are the number 100 * version; their check trusts nobody but the receipt."""

    def buckets() -> Iterator[Bucket]:
        yield [("w", torch.tensor(100 * version))]

    def verify(engine: EngineHandle, receipt: Receipt) -> str:
        found = receipt.checksums["w"]
        return "" if found == str(100 * version) else f"w is {found}, expected {100 * version}"

    return Weights(version, buckets, verify)


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
        measured = fleet.update(weights(1))
        assert fleet.generate(PROMPTS, SAMPLING) == expected(1)
        assert fleet.health() == ""
    assert measured["sync/engines"] == 2
    assert sorted(ash.served + elm.served) == list(range(17))
    assert min(len(ash.served), len(elm.served)) > 3
    assert not ash.running and not elm.running


@pytest.mark.parametrize("how", [DIE, HANG])
@pytest.mark.parametrize("instant", [1, 2, 5])
def test_requests_of_an_engine_that_dies_or_hangs_are_answered_once_by_another(
    how: str, instant: int
) -> None:
    ash, elm = FakeEngine("ash", {("generate", instant): how}), FakeEngine("elm")
    with fleet_of(ash, elm, limits=replace(LIMITS, request_s=SHORT_S)) as fleet:
        fleet.update(weights(1))
        assert fleet.generate(PROMPTS, SAMPLING) == expected(1)


def test_an_engine_whose_process_answers_nothing_any_more_is_replaced() -> None:
    ash = FakeEngine("ash", {("generate", 4): FREEZE})
    with fleet_of(ash, limits=replace(LIMITS, silence_s=SHORT_S)) as fleet:
        fleet.update(weights(1))
        assert fleet.generate(PROMPTS, SAMPLING) == expected(1)
    assert ash.calls["start"] >= 2


def test_a_lone_engine_that_dies_comes_back_with_weights_before_it_serves() -> None:
    ash = FakeEngine("ash", {("generate", 4): DIE, ("generate", 11): HANG})
    with fleet_of(ash, limits=replace(LIMITS, request_s=SHORT_S)) as fleet:
        fleet.update(weights(1))
        fleet.update(weights(2))
        assert fleet.generate(PROMPTS, SAMPLING) == expected(2)
    assert ash.calls["start"] >= 3 and ash.calls["update"] == ash.calls["start"] + 1


@pytest.mark.parametrize("how", [DIE, HANG])
@pytest.mark.parametrize("phase", ["start", "update"])
def test_an_engine_that_breaks_once_in_start_or_update_is_started_again(phase: str, how: str) -> None:
    ash = FakeEngine("ash", {(phase, 1): how})
    with fleet_of(ash, limits=replace(LIMITS, **{f"{phase}_s": SHORT_S})) as fleet:
        fleet.update(weights(1))
        assert fleet.generate(PROMPTS, SAMPLING) == expected(1)
    assert ash.calls["start"] >= 2


def test_no_engine_left_is_an_error_with_the_last_lines_of_their_logs() -> None:
    ash, elm = (
        FakeEngine("ash", {("start", 0): DIE}),
        FakeEngine("elm", {("generate", 0): DIE, ("start", 2): DIE}),
    )
    elm.trouble[("start", 3)] = DIE
    with fleet_of(ash, elm) as fleet:
        fleet.update(weights(1))
        with pytest.raises(EngineError) as raised:
            fleet.generate(PROMPTS, SAMPLING)
    assert "no engine is left (ash, elm)" in str(raised.value)
    for words in ("engine ash: dead, given up", "broke in start", "ash: the last line", "elm: the last line"):
        assert words in str(raised.value)


def test_weights_that_arrive_damaged_once_are_sent_again() -> None:
    ash = FakeEngine("ash", damage=lambda update: 7 * (update == 1))
    with fleet_of(ash) as fleet:
        fleet.update(weights(1))
        assert fleet.generate(PROMPTS, SAMPLING) == expected(1)
    assert ash.calls["update"] == 2 and ash.calls["start"] == 1


def test_weights_that_never_arrive_right_stop_the_run_and_are_never_served() -> None:
    ash, elm = FakeEngine("ash", damage=lambda update: 7), FakeEngine("elm")
    with fleet_of(ash, elm) as fleet, pytest.raises(EngineError) as raised:
        fleet.update(weights(1))
    assert "weights of version 1 refused (ash)" in str(raised.value)
    assert "w is 107, expected 100" in str(raised.value)
    assert ash.served == [] and ash.calls["update"] == 2


def test_new_weights_during_a_generate_leave_no_sample_of_mixed_or_unknown_weights() -> None:
    class Prompting(FakeEngine):
        def generate(self, *arguments: object) -> list[list[Sample]]:
            if self.calls.get("generate", 0) >= 10 and turn.acquire(blocking=False):
                updating.start()
                while fleet.policy_version != 2:
                    time.sleep(0.001)
            return super().generate(*arguments)  # type: ignore[arg-type]

    ash, elm = Prompting("ash"), FakeEngine("elm")
    many = [[q, q + 1] for q in range(90)]
    with fleet_of(ash, elm) as fleet:
        fleet.update(weights(1))
        turn = threading.Lock()
        updating = threading.Thread(target=lambda: fleet.update(weights(2)))
        groups = fleet.generate(many, SAMPLING)
        updating.join()
    versions = [sample.policy_version for group in groups for sample in group]
    assert [group[0].tokens[:2] for group in groups] == [tuple(p) for p in many]
    assert set(versions) == {1, 2}
    assert all(s.tokens[-1] == 100 * s.policy_version for group in groups for s in group)


def test_a_prompt_that_every_engine_refuses_is_an_error_and_ends_what_runs() -> None:
    class Picky(FakeEngine):
        def generate(self, prompts: Sequence[Sequence[int]], *rest: object) -> list[list[Sample]]:
            if prompts[0][0] == 5:
                raise EngineError("prompt is too long")
            return super().generate(prompts, *rest)  # type: ignore[arg-type]

    ash, elm = Picky("ash"), Picky("elm")
    with fleet_of(ash, elm) as fleet:
        fleet.update(weights(1))
        with pytest.raises(EngineError, match=r"request 5 failed 5 times:\n  (ash|elm): prompt is too long"):
            fleet.generate(PROMPTS, SAMPLING)
        without = [p for p in PROMPTS if p[0] != 5]
        assert [g[0].tokens[0] for g in fleet.generate(without, SAMPLING)] == [p[0] for p in without]
    assert ash.calls["abort"] >= 1


def test_a_fault_of_the_programme_is_raised_where_the_fleet_is_waited_for() -> None:
    def verify(engine: EngineHandle, receipt: Receipt) -> str:
        raise ZeroDivisionError("in the probe")

    with fleet_of(FakeEngine("ash")) as fleet, pytest.raises(ZeroDivisionError, match="in the probe"):
        fleet.update(Weights(1, lambda: [], verify))


def test_engines_that_slept_serve_nothing_before_they_have_weights_again() -> None:
    ash = FakeEngine("ash")
    with fleet_of(ash) as fleet:
        fleet.update(weights(1))
        fleet.sleep()
        with pytest.raises(EngineError, match="no weights; call update before generate"):
            fleet.generate(PROMPTS, SAMPLING)
        fleet.wake()
        fleet.update(weights(2))
        assert fleet.generate(PROMPTS, SAMPLING) == expected(2)
    assert ash.calls["sleep"] == ash.calls["wake"] == ash.calls["start"] == 1


def test_a_heartbeat_slower_than_the_silence_it_breaks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"heartbeat_s is 20.0; above 0 and below silence_s = 20"):
        Fleet({"ash": FakeEngine("ash")}, LIMITS, heartbeat_s=20.0)
