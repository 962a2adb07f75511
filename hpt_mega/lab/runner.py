"""Does the runs of a lab: each worker process has one core, a deadline a job, and is replaced when it fails.

What is done already is not done again; a job that was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import fcntl
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from hpt_mega.config import ConfigError
from hpt_mega.lab.grid import Job, Run
from hpt_mega.process import die_with_parent
from hpt_mega.telemetry.terminal import duration


class JobError(RuntimeError):
    """A job that failed or overran its deadline; the message names its log."""


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep a second lab out of the folder. Raises ConfigError where there is one."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"another hpt lab works in {folder}; wait for it or set another --out"
            ) from None
        yield


class Worker:
    """A process of worker.py, started with its first job."""

    def __init__(self, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self.process: subprocess.Popen[bytes] | None = None

    def do(self, job: Job) -> None:
        """Do a job. Raises JobError; the process is gone then, and the next job starts another."""
        process = self.process or self._start()
        log = job.run_dir / "logs" / "lab.log"
        request = {"verb": job.verb, "settings": job.settings, "log": str(log)}
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
        error = self._reply(process)
        if error:
            self.close()
            raise JobError(f"{error}; see {log}")

    def _reply(self, process: subprocess.Popen[bytes]) -> str:
        """What went wrong with the job, empty where nothing did."""
        assert process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(self._deadline_s):
                return f"not done after {self._deadline_s:.0f} s (deadline_s of conf/lab)"
        line = process.stdout.readline()
        if not line:
            return f"its process ended with code {process.wait()}"
        return str(json.loads(line).get("error", ""))

    def _start(self) -> subprocess.Popen[bytes]:
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hpt_mega.lab.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # each job has its own log
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": path,
            },
            preexec_fn=die_with_parent,
        )
        return self.process

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                with suppress(BrokenPipeError):
                    pipe.close()
            self.process = None


def execute(runs: Sequence[Run], workers: int, deadline_s: float) -> list[str]:
    """Do the runs that are not done yet; returns what went wrong, a line a run that failed."""
    todo: queue.SimpleQueue[Run] = queue.SimpleQueue()
    for run in runs:
        if not run.is_done:
            todo.put(run)
    progress = Progress(len(runs), todo.qsize())
    threads = [
        threading.Thread(target=_work, args=(todo, progress, deadline_s), daemon=True)
        for _ in range(min(workers, todo.qsize()))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for run in runs:
        if not run.is_done and run not in progress.failures:
            progress.failed(run, "the thread that was to do it has ended")
    return [f"{run.name}: {why}" for run, why in progress.failures.items()]


def _work(todo: queue.SimpleQueue[Run], progress: Progress, deadline_s: float) -> None:
    worker = Worker(deadline_s)
    try:
        while True:
            _do(todo.get_nowait(), worker, progress)
    except queue.Empty:
        pass
    finally:
        worker.close()


def _do(run: Run, worker: Worker, progress: Progress) -> None:
    """Do a run; whatever goes wrong with it costs this run alone."""
    begun = time.monotonic()
    try:
        run.begin()
        for job in run.jobs:
            if not job.is_done:
                worker.do(job)
        if not run.is_done:
            raise JobError("its jobs have ended and left no results")
        run.tidy()
        progress.done(run, time.monotonic() - begun)
    except JobError as error:
        progress.failed(run, str(error))
    except Exception as error:  # a full disk, no further process, a summary that cannot be read
        worker.close()
        progress.failed(run, f"{type(error).__name__}: {error}")


class Progress:
    """A line a run that has ended, with an estimate of what is left."""

    def __init__(self, total: int, todo: int) -> None:
        self.failures: dict[Run, str] = {}
        self._total, self._todo = total, todo
        self._ended = total - todo
        self._begun = time.monotonic()
        self._lock = threading.Lock()
        if self._ended:
            print(f"{self._ended} of {total} runs are done already", flush=True)

    def done(self, run: Run, seconds: float) -> None:
        accuracy = _accuracy(run)
        with self._lock:
            self._ended += 1
            self._say(f"{run.name}: {accuracy} in {duration(seconds)}")

    def failed(self, run: Run, why: str) -> None:
        with self._lock:
            self._ended += 1
            self.failures[run] = why
            self._say(f"{run.name} FAILED: {why}")

    def _say(self, what: str) -> None:
        ended_now = self._todo - (self._total - self._ended)
        elapsed = time.monotonic() - self._begun
        left = elapsed / ended_now * (self._total - self._ended)
        print(f"{self._ended}/{self._total}  {what}  left {duration(left)}", flush=True)


def _accuracy(run: Run) -> str:
    """The held-out accuracy before and after the run's last training."""
    summary = json.loads((run.folder / "summary.json").read_text())
    return f"{100 * summary['initial_accuracy']:.1f} -> {100 * summary['final_accuracy']:.1f} %"
