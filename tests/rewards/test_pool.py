"""RewardPool on honest and hostile answers: what is right, what is wrong, and what neither may cost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from hpt_mega.rewards import RewardPool


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool("math", workers=2, deadline_s=2.0) as pool:
        pool.score([r"\boxed{x^2+1}"], ["1+x^2"])  # both workers have their imports behind them after this
        yield pool


@pytest.mark.parametrize(
    ("response", "answer", "reward"),
    [
        (r"so \boxed{\frac{1}{2}}", "0.5", 1.0),
        (r"so \boxed{\sqrt{8}}", r"2\sqrt{2}", 1.0),
        (r"so \boxed{\sqrt{8}}", r"2\sqrt{3}", 0.0),
        (r"so \boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"so \boxed{\left(1, 2\right)}", "(1,2)", 1.0),
        (r"so \boxed{(2, 1)}", "(1,2)", 0.0),
        (r"so \boxed{3 \times 10^5}", "300000", 1.0),
        (r"so \boxed{\frac{\pi}{4}}", r"\pi/4", 1.0),
    ],
)
def test_symbolic_answers_are_compared_by_value(
    pool: RewardPool, response: str, answer: str, reward: float
) -> None:
    assert pool.score([response], [answer]) == [reward]


@pytest.mark.parametrize(
    "response",
    [
        r"\boxed{9^{9^{9^{9}}}}",
        r"\boxed{9**9**9**9}",
        r"\boxed{" + "(" * 990 + "}",
        r"\boxed{" + "{" * 1_000_000,
        r"\boxed{" + r"\frac{1}{" * 100 + "2" + "}" * 100 + "}",
        "7" * 10_000_000,
        r"\boxed{" + "9" * 10_000_000 + "}",
        r"\boxed{(1+x)^{99999}}",
        r"\boxed{99999999!}",
        r"\boxed{\x00\ud800}",
        "",
    ],
    ids=lambda response: response[:24] or "empty",
)
def test_a_hostile_answer_costs_at_most_the_deadline_and_earns_nothing(
    pool: RewardPool, response: str
) -> None:
    started = time.monotonic()
    [verdict] = pool.verdicts([response], [r"\sqrt{7}"])
    assert verdict.reward == 0.0 and verdict.why
    assert (
        time.monotonic() - started < 2.0 + 1.5
    )  # the deadline, and the time to notice it on a loaded machine


def test_answers_beside_a_hostile_one_keep_their_rewards_and_order(pool: RewardPool) -> None:
    responses = [
        r"\boxed{2\sqrt{2}}",
        r"\boxed{99999999!}",
        "the answer is 4",
        r"\boxed{x}",
        r"\boxed{\sqrt{8}}",
    ]
    answers = [r"\sqrt{8}", r"\sqrt{8}", "4", "y", r"2\sqrt{2}"]
    assert pool.score(responses, answers) == [1.0, 0.0, 1.0, 0.0, 1.0]


def test_a_worker_killed_from_outside_is_replaced(pool: RewardPool) -> None:
    for worker in pool._workers:
        os.kill(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
    pool.verdicts([r"\boxed{\sqrt{8}}"] * 2, [r"2\sqrt{2}"] * 2)
    assert pool.score([r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"]) == [1.0]


def test_a_worker_that_hangs_is_killed_at_the_deadline_and_replaced() -> None:
    with RewardPool(workers=1, deadline_s=0.5) as pool:
        pool.score([r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"])
        [worker] = pool._workers
        os.kill(worker.process.pid, signal.SIGSTOP)
        [verdict] = pool.verdicts([r"\boxed{\sqrt{8}}"], [r"2\sqrt{2}"])
        assert (verdict.reward, verdict.why) == (0.0, "deadline of 0.5 s")
        assert not is_running(worker.process.pid)
        assert pool.score([r"\boxed{\sqrt{2}}"], [r"2/\sqrt{2}"]) == [1.0]


def test_workers_end_when_the_process_that_started_them_is_killed() -> None:
    script = (
        "from hpt_mega.rewards import RewardPool; import time; pool = RewardPool(workers=2)\n"
        "print(*[worker.process.pid for worker in pool._workers], flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    give_up = time.monotonic() + 30
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < give_up, f"workers {pids} outlived their parent"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_worker_imports_no_torch() -> None:
    script = (
        "import sys, hpt_mega.rewards.worker as w; w.symbolic_comparison(1.0); print('torch' in sys.modules)"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "False"


def test_plain_answers_are_settled_by_the_thousand_per_second(pool: RewardPool) -> None:
    responses = [f"Step 1: 5 + {i} = {5 + i}\n" * 5 + f"\\boxed{{{5 + i}}}" for i in range(2000)]
    started = time.monotonic()
    assert sum(pool.score(responses, [str(5 + i) for i in range(2000)])) == 2000
    assert time.monotonic() - started < 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "poetry"}, "expected one of math"),
        ({"workers": 0}, "reward.workers is 0"),
        ({"deadline_s": 0.0}, "reward.deadline_s 0.0"),
    ],
)
def test_impossible_settings_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardPool(**arguments)  # type: ignore[arg-type]


def test_a_closed_pool_and_unequal_lengths_are_errors(pool: RewardPool) -> None:
    with pytest.raises(ValueError, match="2 responses and 1 answers"):
        pool.score(["1", "2"], ["1"])
    other = RewardPool()
    other.close()
    other.close()
    with pytest.raises(RuntimeError, match="closed"):
        other.score(["1"], ["1"])
