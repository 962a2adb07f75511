"""Steps done by several processes of this machine, which are copies of the one that hands out the steps.

What a step is, and which are done already, is the caller's business.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

SILENT_S = 1800  # no worker has finished a step for so long: the file system hangs


class WorkerError(ValueError):
    """A step failed in a worker."""


class LostWorkerError(WorkerError):
    """A worker was killed, or no longer answers: what the others did stands."""


def each_step(steps: Sequence[str], work: Callable[[str], Any], processes: int) -> Iterator[tuple[str, Any]]:
    """Do every step, in this process or by so many workers; gives each with its result when it is done.

    Steps begin in order. Workers are forked when the first result is asked for: what `work` has open by then
    is theirs too, and it must neither have begun threads nor use CUDA. Raises what `work` raises, as
    WorkerError where a worker did, and LostWorkerError where one dies or none ends a step within SILENT_S.
    """
    if processes == 1 or len(steps) < 2:
        for step in steps:
            yield step, work(step)
        return
    crew = _Crew(work, min(processes, len(steps)))
    try:
        yield from crew.do(steps)
    finally:
        crew.end()


class _Crew:
    """The workers, each with the connection over which it is told steps and answers results."""

    def __init__(self, work: Callable[[str], Any], count: int) -> None:
        fork = multiprocessing.get_context("fork")
        self._names: dict[Connection, str] = {}
        self._processes: dict[Connection, Any] = {}
        for number in range(1, count + 1):
            ours, theirs = fork.Pipe()
            # a copy of our ends in a worker would keep the others from seeing that we are gone
            process = fork.Process(target=_serve, args=(theirs, [*self._names, ours], work), daemon=True)
            process.start()
            theirs.close()
            self._names[ours] = f"worker {number} of {count}"
            self._processes[ours] = process

    def do(self, steps: Sequence[str]) -> Iterator[tuple[str, Any]]:
        waiting = iter(steps)
        doing: dict[Connection, str] = {}
        for worker in self._names:
            self._tell(worker, waiting, doing)
        while doing:
            answered = multiprocessing.connection.wait(list(doing), SILENT_S)
            if not answered:
                raise LostWorkerError(
                    f"no worker has finished a step for {SILENT_S} s; they are at {', '.join(doing.values())}"
                )
            for worker in [one for one in doing if one in answered]:
                step = doing.pop(worker)
                result = self._answer(worker, step)
                self._tell(worker, waiting, doing)
                yield step, result

    def end(self) -> None:
        for worker, process in self._processes.items():
            process.kill()
            process.join()
            worker.close()

    def _tell(self, worker: Connection, waiting: Iterator[str], doing: dict[Connection, str]) -> None:
        if (step := next(waiting, None)) is not None:
            doing[worker] = step
            worker.send(step)

    def _answer(self, worker: Connection, step: str) -> Any:
        name = self._names[worker]
        try:
            result, error = worker.recv()
        except (EOFError, ConnectionResetError):
            process = self._processes[worker]
            process.join()
            raise LostWorkerError(
                f"{name} died at {step} (exit code {process.exitcode}; {-signal.SIGKILL} where memory ran "
                "out); the same command goes on from there, fewer --processes need less memory"
            ) from None
        if error is not None:
            raise WorkerError(f"{name} failed at {step}: {error}")
        return result


def _serve(commands: Connection, foreign: list[Connection], work: Callable[[str], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who hands out steps ends us
    torch.set_num_threads(1)  # a copy of a process has none of its threads
    for connection in foreign:
        connection.close()
    while True:
        try:
            step = commands.recv()
        except EOFError:
            return
        try:
            answer: tuple[Any, str | None] = (work(step), None)
        except (ValueError, OSError) as error:
            answer = (None, str(error))
        commands.send(answer)
