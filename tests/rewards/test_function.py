"""A user's own reward function: its value and reason, and that it can neither hang, crash nor eat a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hpt_mega.rewards import RewardPool
from hpt_mega.rewards.command import grade_file
from hpt_mega.rewards.function import call, load_function
from tests.rewards.own_rewards import measured

OWN = "tests.rewards.own_rewards"
DEADLINE_S = 2.0


@pytest.fixture(autouse=True)
def tests_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def test_its_number_is_the_reward_and_its_reason_is_kept() -> None:
    with RewardPool(f"{OWN}.length", workers=2, deadline_s=DEADLINE_S) as pool:
        assert pool.score(["x" * 3, "x" * 40, ""], ["4", "8", "2"]) == [0.75, 1.0, 0.0]
        big = "y" * 3_000_000  # more than a pipe holds
        verdicts = pool.verdicts([big, "2"], [big, "2"], [f"{OWN}.explained", "math"])
    assert [(verdict.reward, verdict.why) for verdict in verdicts] == [
        (1.0, "3000000 characters"),
        (1.0, "same text"),
    ]


def test_its_number_may_be_of_any_kind_that_is_real() -> None:
    assert call(measured, "a", "b") == (0.25, "")


def test_it_is_ended_at_its_deadline_and_the_others_keep_their_rewards() -> None:
    with RewardPool(f"{OWN}.slow", workers=2, deadline_s=DEADLINE_S) as pool:
        pool.score(["a", "b"], ["", ""])
        started = time.monotonic()
        verdicts = pool.verdicts(["a", "hang", "b"], [""] * 3)
        assert time.monotonic() - started < DEADLINE_S + 2
    assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 1.0]
    assert [verdict.failed for verdict in verdicts] == [False, True, False]
    assert verdicts[1].why == "deadline of 2 s"


def test_a_step_is_graded_within_its_budget_and_what_is_left_earns_nothing() -> None:
    with RewardPool(f"{OWN}.slow", workers=2, deadline_s=60.0, budget_s=1.5) as pool:
        while pool.score(["a"], [""]) == [0.0]:
            pass  # the workers are starting
        started = time.monotonic()
        verdicts = pool.verdicts(["a", "hang", "hang", "b", "c"], [""] * 5)
        assert time.monotonic() - started < 1.5 + 2
        assert [verdict.reward for verdict in verdicts] == [1.0, 0.0, 0.0, 0.0, 0.0]
        assert {verdict.why.partition(",")[0] for verdict in verdicts[1:]} == {"not graded within 1.5 s"}
        assert not any(worker.item is not None for worker in pool._workers)


def test_what_it_started_is_ended_with_it_at_the_deadline(tmp_path: Path) -> None:
    number = tmp_path / "number"
    with RewardPool(f"{OWN}.judge", deadline_s=DEADLINE_S) as pool:
        [verdict] = pool.verdicts(["import time; time.sleep(600)"], [str(number)])
        assert verdict.why == "deadline of 2 s"
        assert ends(int(number.read_text()))


def test_it_and_what_it_started_end_when_the_run_is_killed(tmp_path: Path) -> None:
    number = tmp_path / "number"
    script = (
        "from hpt_mega.rewards import RewardPool\n"
        f"pool = RewardPool('{OWN}.judge', deadline_s=600)\n"
        f"pool.verdicts(['import time; time.sleep(600)'], ['{number}'])"
    )
    run = subprocess.Popen([sys.executable, "-c", script])
    while not (number.is_file() and number.read_text()):
        assert run.poll() is None
        time.sleep(0.05)
    program = psutil.Process(int(number.read_text()))
    worker = program.ppid()
    run.kill()
    run.wait()
    assert ends(worker) and ends(program.pid)


def test_what_it_started_reads_no_requests() -> None:
    with RewardPool(f"{OWN}.overheard", deadline_s=DEADLINE_S) as pool:
        [verdict] = pool.verdicts(["a"], ["b"])
    assert (verdict.reward, verdict.why) == (1.0, "")


def test_it_is_told_no_secrets_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [
        "HPT_ROLLOUT_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_ACCESS_KEY_ID",
        "PGPASSWORD",
        "api_keys",
    ]
    others = ["MY_TOKENIZER", "KEYBOARD", "OMP_NUM_THREADS"]
    for name in (*secrets, *others):
        monkeypatch.setenv(name, "1")
    with RewardPool(f"{OWN}.known", deadline_s=DEADLINE_S) as pool:
        [verdict] = pool.verdicts([" ".join(secrets + others)], [""])
    assert verdict.why.split() == others


def ends(pid: int) -> bool:
    """Whether the process ends within 30 s; its exit code may be left for somebody to ask for."""
    for _ in range(300):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    return False


def test_what_it_raises_or_wrongly_returns_is_a_reward_of_nothing_with_the_reason() -> None:
    with RewardPool("math", deadline_s=DEADLINE_S, memory_mib=600) as pool:
        responses, answers = ["nan", "two", "zero", "memory"], ["", "", "", str(2 << 30)]
        kinds = [f"{OWN}.broken"] * 3 + [f"{OWN}.hungry"]
        verdicts = pool.verdicts(responses, answers, kinds)
    assert [(verdict.reward, verdict.failed) for verdict in verdicts] == [(0.0, True)] * 4
    assert [verdict.why for verdict in verdicts] == [
        "ValueError: it returned nan, expected a number from 0 to 1",
        "ValueError: it returned 2.0, expected a number from 0 to 1",
        "ZeroDivisionError: division by zero",
        "memory limit",
    ]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (f"{OWN}.lenght", "has no lenght"),
        ("tests.rewards.absent.f", "must be installed or stand on PYTHONPATH"),
        (f"{OWN}.NUMBER", "is a int, expected a function"),
    ],
)
def test_a_path_that_leads_nowhere_is_an_error_at_once(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_function(path)
    with RewardPool(path, deadline_s=DEADLINE_S) as pool, pytest.raises(RuntimeError, match=message):
        pool.score(["a"], ["b"])


def test_a_file_to_grade_cannot_name_a_function(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({"answer": "1", "response": "1", "kind": f"{OWN}.length"}))
    with pytest.raises(ValueError, match="expected one of math, choice, exact, format"):
        grade_file(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
