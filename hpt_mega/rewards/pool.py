"""Verdicts on many responses: plain ones in process, the rest in worker processes with a hard deadline.

How an answer is read and compared lives in math.py, choice.py and compare.py.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hpt_mega.rewards.choice import choice_verdict
from hpt_mega.rewards.format import format_verdict
from hpt_mega.rewards.function import is_dotted
from hpt_mega.rewards.math import ANSWER_CHARACTERS, exact_verdict, final_answer, quick_verdict, unboxed
from hpt_mega.rewards.verdict import Verdict

# The verdict on (response, answer) by kind; None where workers are to compare.
_IN_PROCESS: dict[str, Callable[[str, str], Verdict | None]] = {
    "math": quick_verdict,
    "choice": choice_verdict,
    "exact": exact_verdict,
    "format": format_verdict,
}
KINDS = tuple(_IN_PROCESS)
COMPARING = ("math", "choice", "exact")  # with a gold answer


def is_kind(kind: str) -> bool:
    """Whether a kind is one of KINDS or could be a function's dotted path."""
    return kind in KINDS or is_dotted(kind)


def _request(kind: str, response: str, answer: str) -> dict[str, str]:
    """What a worker is asked: to compare two answers, or to call a function on the whole response."""
    if kind in KINDS:
        return {"given": final_answer(response) or "", "answer": unboxed(answer)}
    return {"function": kind, "given": response, "answer": answer}


MEMORY_MIB = 1024  # of a worker's address space
START_FAILURES = 3  # in a row, of workers that end before they are ready
START_DEADLINE_S = 120.0  # importing sympy on a loaded machine


# Keys of servers and services, which code under judgement has no business with.
_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET)S?(_|$)|PASSWORD", re.IGNORECASE)


def _environment() -> dict[str, str]:
    """A worker's: ours without secrets."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
    public = {name: value for name, value in os.environ.items() if not _SECRET.search(name)}
    return public | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"}  # sympy orders by hash


class _Worker:
    """One worker process and its item. Pipes of JSON lines: no pickle, and __main__ is not imported again."""

    def __init__(self, deadline_s: float, memory_mib: int, function: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hpt_mega.rewards.worker", str(deadline_s), str(memory_mib), function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=_environment(),
            bufsize=0,
            start_new_session=True,  # for kill()
        )
        assert self.process.stdout is not None and self.process.stdin is not None
        self.replies = self.process.stdout
        self.requests = self.process.stdin
        self.ready = False
        self.item: int | None = None
        self.must_reply_by = time.monotonic() + START_DEADLINE_S
        self._buffer = b""

    @property
    def is_awaited(self) -> bool:
        """Whether it owes us something: the verdict on an item, or the sign that it has started."""
        return self.item is not None or not self.ready

    def send(self, item: int, request: dict[str, str], deadline_s: float) -> None:
        self.item = item
        self.must_reply_by = time.monotonic() + deadline_s
        # Where it died while idle, the end of its output is noticed next and the item counted there.
        with contextlib.suppress(BrokenPipeError):
            self._write(json.dumps(request).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        """All of it: an unbuffered pipe takes no more at once than it has room for."""
        while line:
            line = line[self.requests.write(line) :]

    def receive(self) -> dict[str, Any] | None:
        """The next reply, {} where it is not complete yet, None where the process has ended."""
        chunk = os.read(self.replies.fileno(), 65536)
        if not chunk:
            return None
        self._buffer += chunk
        if b"\n" not in self._buffer:
            return {}
        line, self._buffer = self._buffer.split(b"\n", 1)
        reply: dict[str, Any] = json.loads(line)
        return reply

    def kill(self) -> None:
        """End the process and what it has started, such as code under judgement that hangs."""
        if self.process.returncode is None:  # until wait() its number is no other process's
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.requests.close()
        self.replies.close()


class RewardError(RuntimeError):
    """A step of which no response could be judged."""


class RewardPool:
    """Rewards for batches of responses; use as a context manager or call close().

    kind: one of KINDS, or the dotted path of a function as in function.py. workers: number of processes for
    such functions, and for the answers that exact arithmetic cannot settle; memory_mib caps the address space
    of each. deadline_s: wall seconds one answer may take; a worker that overruns it is killed and replaced,
    and the answer gets reward 0. budget_s: wall seconds that one call may take; what the workers have not
    settled by then gets reward 0 too. Threads may share a pool: they take turns. Raises ValueError for an
    unknown kind or impossible numbers.
    """

    def __init__(
        self,
        kind: str = "math",
        workers: int = 1,
        deadline_s: float = 5.0,
        memory_mib: int = MEMORY_MIB,
        budget_s: float = math.inf,
    ) -> None:
        if not is_kind(kind):
            known = ", ".join(KINDS)
            raise ValueError(f"reward.kind is {kind!r}, expected one of {known}, or MODULE.FUNCTION")
        if workers < 1 or not deadline_s > 0:
            raise ValueError(
                f"reward.workers is {workers} and reward.deadline_s {deadline_s}; "
                "at least 1 and above 0 are needed"
            )
        self._kind = kind
        self._deadline_s = deadline_s
        self._memory_mib = memory_mib
        self._budget_s = budget_s
        self._function = "" if kind in KINDS else kind
        self._turn = threading.Lock()
        self._start_failures = 0
        # Started now, so that their imports overlap with the first rollout.
        self._workers = [_Worker(deadline_s, memory_mib, self._function) for _ in range(workers)]
        self._closed = False

    def score(self, responses: Sequence[str], answers: Sequence[str]) -> list[float]:
        """Rewards from 0.0 to 1.0, one for each response, in order."""
        return [verdict.reward for verdict in self.verdicts(responses, answers)]

    def verdicts(
        self, responses: Sequence[str], answers: Sequence[str], kinds: Sequence[str] | None = None
    ) -> list[Verdict]:
        """Rewards with reasons, in order.

        Takes at most about deadline_s * hard answers / workers seconds, or budget_s where that is less.
        kinds: one a response, where they differ from the pool's.
        Raises ValueError on unequal lengths, RuntimeError where no worker starts or the pool is closed.
        """
        if len(responses) != len(answers):
            raise ValueError(
                f"{len(responses)} responses and {len(answers)} answers; one answer a response is needed"
            )
        if self._closed:
            raise RuntimeError("the reward pool is closed; make a new one")
        kinds = [self._kind] * len(responses) if kinds is None else kinds
        quick = [
            _IN_PROCESS[kind](response, answer) if kind in KINDS else None
            for kind, response, answer in zip(kinds, responses, answers, strict=True)
        ]
        hard = {
            i: _request(kinds[i], responses[i], answers[i]) for i, done in enumerate(quick) if done is None
        }
        with self._turn:
            settled = self._compare(hard) if hard else {}
        # a function reads the whole response, of which the end stands for it
        given = {i: request["given"][-ANSWER_CHARACTERS:].strip() for i, request in hard.items()}
        return [
            verdict if verdict is not None else replace(settled[i], given=given[i])
            for i, verdict in enumerate(quick)
        ]

    def _compare(self, hard: dict[int, dict[str, str]]) -> dict[int, Verdict]:
        """The workers' verdicts on {item: request}."""
        waiting = deque(hard)
        settled: dict[int, Verdict] = {}
        end = time.monotonic() + self._budget_s
        while len(settled) < len(hard):
            if time.monotonic() >= end:
                self._give_up(hard, settled)
                break
            for worker in self._workers:
                if worker.ready and worker.item is None and waiting:
                    item = waiting.popleft()
                    worker.send(item, hard[item], self._deadline_s)
            busy = [worker for worker in self._workers if worker.is_awaited]
            for worker in self._readable(busy, end):
                self._take_reply(worker, settled)
            for worker in busy:
                if worker.replies.closed or not worker.is_awaited:
                    continue  # replaced, or answered, in the loop above
                if time.monotonic() >= worker.must_reply_by:
                    self._replace(worker, f"deadline of {self._deadline_s:g} s", settled)
        return settled

    @staticmethod
    def _readable(busy: list[_Worker], end: float) -> list[_Worker]:
        """The workers with something to read, as soon as there is one or the first deadline has come."""
        wait_s = max(0.0, min(end, *(worker.must_reply_by for worker in busy)) - time.monotonic())
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            return [key.data for key, _ in selector.select(wait_s)]

    def _take_reply(self, worker: _Worker, settled: dict[int, Verdict]) -> None:
        reply = worker.receive()
        if reply is None:
            self._replace(worker, "the worker died", settled)
        elif "error" in reply:
            raise RuntimeError(f"a reward worker cannot start: {reply['error']}")
        elif "ready" in reply:
            worker.ready = True
            self._start_failures = 0
        elif reply:
            assert worker.item is not None
            settled[worker.item] = Verdict(float(reply["reward"]), str(reply["why"]), failed=reply["failed"])
            worker.item = None

    def _replace(self, worker: _Worker, why: str, settled: dict[int, Verdict]) -> None:
        """Kills a worker, counts its item as wrong and starts another in its place."""
        worker.kill()
        self._start_failures += not worker.ready
        if self._start_failures == START_FAILURES:
            raise RuntimeError(
                f"{START_FAILURES} reward workers in a row did not start within {START_DEADLINE_S:g} s "
                f"(exit code {worker.process.returncode}). "
                f"Try: {sys.executable} -m hpt_mega.rewards.worker {self._deadline_s:g} {self._memory_mib}"
            )
        if worker.item is not None:
            settled[worker.item] = Verdict(0.0, why, failed=True)
        fresh = _Worker(self._deadline_s, self._memory_mib, self._function)
        self._workers[self._workers.index(worker)] = fresh

    def _give_up(self, hard: Iterable[int], settled: dict[int, Verdict]) -> None:
        """Counts all that is not settled as wrong."""
        why = f"not graded within {self._budget_s:g} s, which is all that a step's answers may take together"
        for worker in [worker for worker in self._workers if worker.item is not None]:
            self._replace(worker, why, settled)
        settled |= {item: Verdict(0.0, why, failed=True) for item in hard if item not in settled}

    def close(self) -> None:
        """Ends the workers. Further calls of close() do nothing."""
        for worker in () if self._closed else self._workers:
            worker.kill()
        self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
