"""Starts the processes of a run on this machine by torchrun, and turns their failures into one report.

What a process does is in worker.py. By torchrun: `python -m hpt_mega.launch CONFIG WORKER`.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from hpt_mega.config import Config, save
from hpt_mega.process import die_with_parent, free_port, tail

WORKER = "hpt_mega.worker"
TORCHRUN = "torch.distributed.run"
GRACE_S = 40.0  # torchrun gives its workers 30 s after SIGTERM before it kills them
LOG_LINES = 12
STALE = ("rank*.log", "engine*.log", "torchrun.log", "srun.log", "failure_rank*.json")  # of an earlier run


def launch(cfg: Config) -> int:
    """Train with the config; returns as run does."""
    if "RANK" not in os.environ and cfg.resume == "never":
        _set_aside_finished_run(Path(cfg.run_dir))
    return run(cfg, Path(cfg.run_dir) / "config.yaml", WORKER, cfg.parallel.world_size)


def run(cfg: object, config_path: Path, worker: str, world_size: int) -> int:
    """Save the config (any dataclass) and run the module `worker` with it.

    Inside torchrun (RANK is set) this process is one rank and does the work itself. Otherwise world_size
    processes are started on this machine, and live no longer than this one. Rank 0 writes to this terminal;
    everything else goes to the folder logs beside the config. Returns the exit code, 128 + n where signal n
    ended the run.
    """
    save(cfg, config_path)
    if "RANK" in os.environ:
        return _run_worker(config_path, worker)
    logs = config_path.parent / "logs"
    logs.mkdir(exist_ok=True)
    for stale in [path for pattern in STALE for path in logs.glob(pattern)]:
        stale.unlink()
    shutil.rmtree(logs / "torchrun", ignore_errors=True)
    command = torchrun_command(world_size, config_path, worker)
    code = _supervise(command, _environment(world_size), logs / "torchrun.log")
    if 0 < code < 128:
        print(failure_report(logs), file=sys.stderr)
    return code


def torchrun_command(world_size: int, config_path: Path, worker: str = WORKER) -> list[str]:
    """torchrun on this machine alone, over the loopback interface, without restarts."""
    own_files = config_path.parent / "logs" / "torchrun"  # or it leaves a folder in /tmp
    return [
        sys.executable,
        *("-m", TORCHRUN, "--standalone", "--nnodes=1", f"--nproc-per-node={world_size}"),
        *("--local-addr=127.0.0.1", "--max-restarts=0", f"--log-dir={own_files}"),
        *("-m", "hpt_mega.launch", str(config_path), worker),
    ]


def single_rank_environment() -> dict[str, str]:
    """What torchrun would tell the only rank of a run."""
    return {
        **{"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"},
        **{"MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"},
    }


def _environment(world_size: int) -> dict[str, str]:
    cores = len(os.sched_getaffinity(0))
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // world_size)),
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # for tensor parallelism, as in slurm/common.sh
    }
    return defaults | dict(os.environ)


def _set_aside_finished_run(run_dir: Path) -> None:
    """Rename a finished run's folder, so that its checkpoints are never taken for those of the new run."""
    if not (run_dir / "summary.json").is_file():
        return
    number = 1
    while (aside := run_dir.with_name(f"{run_dir.name}.{number}")).exists():
        number += 1
    run_dir.rename(aside)
    print(f"{run_dir} held a finished run; it is {aside} now")


def _supervise(command: list[str], environment: dict[str, str], log: Path) -> int:
    """Run the command to its end, passing SIGINT and SIGTERM on; a second signal or the grace's end kills."""
    received: list[int] = []
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            command, env=environment, stderr=stderr, start_new_session=True, preexec_fn=die_with_parent
        )

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        os.killpg(process.pid, signal.SIGTERM if len(received) == 1 else signal.SIGKILL)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        waited = 0.0
        while process.poll() is None:
            try:
                process.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                waited += 1.0 if received else 0.0
                if waited > GRACE_S:
                    os.killpg(process.pid, signal.SIGKILL)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


@dataclass(frozen=True)
class Failure:
    """How one rank ended."""

    rank: int
    what: str


def failure_report(logs: Path) -> str:
    """One account of a failed run: the rank that failed first, in which phase, and the end of its log."""
    failure, count = _first_failure(logs)
    if failure is None:
        starter = logs / ("srun.log" if (logs / "srun.log").is_file() else "torchrun.log")
        return f"error: the run failed before any rank began\n{_end_of(starter)}\nlogs: {logs}"
    others = f" ({count - 1} more failed after it)" if count > 1 else ""
    log = logs / f"rank{failure.rank}.log"
    what = f"error: rank {failure.rank} {failure.what}{others}"
    return f"{what}\nlast lines of {log}:\n{_end_of(log)}\nlogs: {logs}"


def _first_failure(logs: Path) -> tuple[Failure | None, int]:
    """The failure the others follow from, and how many ranks failed.

    A rank that a signal killed could leave no note of its own, and its peers fail of the lost connection:
    so it comes first whatever the clock says. SIGTERM is what torchrun itself ends the peers with.
    """
    notes = sorted(
        (json.loads(path.read_text()) for path in logs.glob("failure_rank*.json")),
        key=lambda note: note["time"],
    )
    torchrun = logs / "torchrun.log"
    summary = torchrun.read_text(errors="replace") if torchrun.is_file() else ""
    codes = {
        int(rank): int(code)
        for rank, code in re.findall(r"rank\s*: (\d+) \(local_rank.*\n\s*exitcode\s*: (-?\d+)", summary)
    }
    codes |= _srun_codes(logs / "srun.log")
    count = len(codes.keys() | {note["rank"] for note in notes})
    for rank, code in codes.items():
        if code < 0 and code != -signal.SIGTERM:
            name = signal.Signals(-code).name
            hint = "; the machine may be out of memory" if code == -signal.SIGKILL else ""
            return Failure(rank, f"was killed by {name}{hint}"), count
    if notes:
        return Failure(notes[0]["rank"], f"failed in phase {notes[0]['phase']}: {notes[0]['error']}"), count
    if codes:
        rank, code = list(codes.items())[
            -1 if summary else 0
        ]  # torchrun names the root cause last, srun first
        return Failure(rank, f"ended with exit code {code}"), count
    return None, 0


def _srun_codes(log: Path) -> dict[int, int]:
    """How tasks ended, in the order that srun noticed: exit codes, or the negative number of a signal."""
    numbers = {signal.strsignal(number): -number for number in signal.valid_signals()}
    text = log.read_text(errors="replace") if log.is_file() else ""
    codes: dict[int, int] = {}
    for tasks, code, words in re.findall(
        r"srun: error: \S+: tasks? ([\d,-]+): (?:Exited with exit code (\d+)|([A-Z][A-Za-z ]+))", text
    ):
        for span in tasks.split(","):
            first, _, last = span.partition("-")
            for rank in range(int(first), int(last or first) + 1):
                codes.setdefault(rank, int(code) if code else numbers.get(words.strip(), 1))
    return codes


def _end_of(log: Path) -> str:
    return "\n".join(f"  | {line}" for line in tail(log, LOG_LINES).splitlines()) or "  | (empty)"


def _run_rank(config_path: Path, worker: str) -> int:
    """One rank under torchrun: dies with it, and keeps its log apart from the others'."""
    die_with_parent()
    parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    if TORCHRUN.encode() not in parent.split(b"\0"):
        return 1  # it died before we could ask to die with it
    rank = int(os.environ["RANK"])
    with (config_path.parent / "logs" / f"rank{rank}.log").open("ab") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
        if rank != 0:
            os.dup2(log.fileno(), sys.stdout.fileno())
    return _run_worker(config_path, worker)


def _run_worker(config_path: Path, worker: str) -> int:
    """Run the worker's module as the main one, as `python -m` would; returns its exit code."""
    sys.argv[1:] = [str(config_path)]
    try:
        runpy.run_module(worker, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    sys.exit(_run_rank(Path(sys.argv[1]), sys.argv[2]))
