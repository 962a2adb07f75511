"""SIGKILL at random instants of a run, resumed each time: bench/results/crash.md.

python bench/crash.py [--kills 50] [--minutes 60] [--case vllm]   # a toy model, one process each, CPU

Every run is a fork of a process that has imported what a training process does, and is itself what is killed.
What launchers and torchrun make of a kill is in tests/test_train.py. The cases run beside each other.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
import traceback
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from hpt_mega import worker
from hpt_mega.checkpoint.store import CheckpointStore
from hpt_mega.config import compose, save
from hpt_mega.launch import single_rank_environment
from tests.toy import metrics, save_toy, settings

SAVE_EVERY = 3
STEPS = 100_000  # the rate's schedule knows the number, so that killed and unbroken runs have the same
DEADLINE_S = 900.0
FOLLOWS = {"rollout": "reward", "reward": "train", "train": "sync"}
AIMS = ("anywhere", "rollout", "train", "checkpoint")  # "later": two checkpoints on, so that a run gets on


@dataclass
class Case:
    """A kind of run, the share of kills it gets, and what they cost."""

    name: str
    overrides: tuple[str, ...]
    share: float
    bound: int  # steps that a kill may cost
    head_dim: int = 8
    aims: tuple[str, ...] = AIMS
    phases: dict[str, int] = field(default_factory=dict)  # that kills fell into
    writing: int = 0  # of them while a checkpoint was being written
    lost: list[int] = field(default_factory=list)  # steps done and in no checkpoint, by kill
    orphans: int = 0
    steps: int = 0
    equal: bool = False


def cases() -> list[Case]:
    served = ("rollout=vllm", "precision=fp32", "rollout.server.bucket_mib=2")
    served += ("rollout.server.start_deadline_s=1200",)
    aims = ("later", "sync", "train", "later", "checkpoint", "sync", "anywhere")
    return [
        Case("embedded engine", (), 0.5, SAVE_EVERY),
        Case("trainer.async_save=true", ("trainer.async_save=true",), 0.4, 2 * SAVE_EVERY),
        Case("rollout=vllm", served, 0.1, SAVE_EVERY, head_dim=32, aims=aims),
    ]


def start(case: Case, run_dir: Path, model: Path) -> int:
    """Fork a training process that begins or goes on; returns its id."""
    config = [
        *settings(model),
        *("parallel=single", f"trainer.steps={STEPS}", f"trainer.save_every={SAVE_EVERY}", "resume=auto"),
        *("telemetry.trace=true", f"run_dir={run_dir}", *case.overrides),
    ]
    save(compose(config), run_dir / "config.yaml")

    def train() -> int:
        os.environ |= single_rank_environment()
        return worker.main(str(run_dir / "config.yaml"))

    return fork(train, run_dir.with_suffix(".log"))


def fork(work: Callable[[], int], log: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def wait(what: str, until: Callable[[], bool], pid: int, log: Path) -> None:
    end = time.monotonic() + DEADLINE_S
    while not until():
        if os.waitpid(pid, os.WNOHANG)[0] or time.monotonic() > end:
            sys.exit(f"{what}: not reached\n{log.read_text()[-3000:]}")
        time.sleep(0.01)


def kill_one(case: Case, aim: str, run_dir: Path, model: Path, dice: random.Random) -> None:
    """Let it make a step, kill it in one of the next, at the phase aimed at if the dice will."""
    begun, log = size(run_dir), run_dir.with_suffix(".log")
    pid = start(case, run_dir, model)
    wait("a step", lambda: size(run_dir) > begun, pid, log)
    if aim == "later":
        known = len(metrics(run_dir))
        wait("further steps", lambda: len(metrics(run_dir)) >= known + 2 * SAVE_EVERY, pid, log)
    if aim == "checkpoint":
        wait("a checkpoint", lambda: is_writing(run_dir), pid, log)
        time.sleep(dice.uniform(0, 0.1))
    elif aim in ("anywhere", "later"):
        time.sleep(dice.uniform(0, 3))
    else:
        wait(aim, lambda: phase(run_dir) == aim, pid, log)
        time.sleep(dice.uniform(0, 0.2))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    fell = phase(run_dir)
    case.phases[fell] = case.phases.get(fell, 0) + 1
    case.writing += is_writing(run_dir)
    done = metrics(run_dir)[-1]["step"]
    case.lost.append(done - (CheckpointStore(run_dir, keep=2).latest() or 0))
    case.orphans += len(left_alive())


def size(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.stat().st_size if file.is_file() else 0


def is_writing(run_dir: Path) -> bool:
    return any((run_dir / "checkpoints").glob("*.partial"))


def phase(run_dir: Path) -> str:
    """What the run is in, from the phases that its trace says have ended."""
    with (run_dir / "logs" / "trace_rank0.json").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
        lines = file.read().splitlines()[-4:]
    ended = [json.loads(line.rstrip(b","))["name"] for line in lines if line.endswith(b"},")]
    last = ended[-1] if ended else "eval"
    if last in FOLLOWS:
        return FOLLOWS[last]
    if last == "sync":
        return "between steps"
    saved = metrics(run_dir)[-1]["step"] % SAVE_EVERY != 0 or ended[-2:] == ["checkpoint"] * 2
    return "rollout" if saved else "checkpoint"


def left_alive() -> list[psutil.Process]:
    """Processes of these runs that outlive theirs by more than servers are given to end."""
    end = time.monotonic() + 30
    while found := [process for process in psutil.process_iter() if is_ours(process)]:
        if time.monotonic() > end:
            return found
        time.sleep(0.2)
    return []


def is_ours(process: psutil.Process) -> bool:
    try:
        return process.environ().get("HPT_CRASH") == os.environ["HPT_CRASH"]
    except psutil.Error:
        return False


def mapped() -> set[str]:
    """What living processes hold of /dev/shm; other work on the machine may leave things there too."""
    found = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found |= set(re.findall(r"/dev/shm/(\S+)", maps.read_text()))
    return found


def compare(case: Case, root: Path, model: Path) -> None:
    """A run never killed, of as many steps: are its metrics the same?"""
    done, whole = metrics(root / "killed"), root / "whole"
    pid = start(case, whole, model)
    wait("the unbroken run", lambda: len(metrics(whole)) >= len(done), pid, whole.with_suffix(".log"))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    case.orphans += len(left_alive())
    case.steps, case.equal = len(done) - 1, metrics(whole)[: len(done)] == done


def run(case: Case, kills: int, minutes: float, dice: random.Random, result: Path) -> int:
    begun = time.monotonic()
    os.environ["HPT_CRASH"] = str(uuid.uuid4())  # of all programs that these runs start
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model = root / "toy"
        os.waitpid(fork(lambda: int(not save_toy(model, head_dim=case.head_dim)), root / "toy.log"), 0)
        for number in range(kills):
            if time.monotonic() - begun > minutes * 60:
                break
            aim = case.aims[number % len(case.aims)]
            kill_one(case, aim, root / "killed", model, dice)
            print(f"{case.name}: {aim} {case.phases} lost {case.lost[-1]}", flush=True)
        compare(case, root, model)
    result.write_text(json.dumps(asdict(case)))
    return 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--case", help="only the cases with this in their name; they get all kills")
    parser.add_argument("--out", type=Path, default=Path("bench/results/crash.md"))
    options = parser.parse_args()
    chosen = [case for case in cases() if (options.case or "") in case.name]
    if not chosen:
        parser.error(f"--case {options.case}: expected a part of {', '.join(case.name for case in cases())}")
    share = sum(case.share for case in chosen)
    shared, found = set(os.listdir("/dev/shm")), []
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for number, case in enumerate(chosen):
            result, log = Path(folder) / f"{number}.json", Path(folder) / f"{number}.log"
            kills = round(case.share / share * options.kills)
            given = (case, kills, options.minutes, random.Random(number), result)
            running.append((fork(partial(run, *given), log), result, log))
        for pid, result, log in running:
            if os.waitpid(pid, 0)[1]:
                sys.exit(log.read_text()[-3000:])
            found.append(Case(**json.loads(result.read_text())))
    left = sorted(set(os.listdir("/dev/shm")) - shared - mapped())
    text = "\n".join(report(found, left))
    options.out.write_text(text)
    print(text)
    if left or any(not c.equal or c.orphans or max(c.lost) > c.bound for c in found):
        sys.exit(1)


def report(found: list[Case], left: list[str]) -> list[str]:
    phases = ("rollout", "reward", "train", "sync", "between steps", "checkpoint")
    return [
        "# SIGKILL at random instants",
        "",
        "`python bench/crash.py`: a toy model (1.6 M parameters), one training process, a checkpoint every",
        f"{SAVE_EVERY} steps, deterministic mode. After each kill the run is resumed; at the end its metrics",
        "are compared, bit for bit, with those of a run never killed. Kills are aimed in turn anywhere and",
        "into each phase; counted is where they fell. A save in the background may be one interval behind.",
        "",
        f"| run | kills | {' | '.join(f'in {phase}' for phase in phases)} | while a checkpoint was written "
        "| steps | metrics equal | steps lost a kill, mean (most) | orphans |",
        "|---|---|" + "---|" * (len(phases) + 5),
        *(
            f"| {c.name} | {len(c.lost)} | {' | '.join(str(c.phases.get(phase, 0)) for phase in phases)} "
            f"| {c.writing} | {c.steps} | {'yes' if c.equal else 'NO'} "
            f"| {sum(c.lost) / len(c.lost):.1f} ({max(c.lost)}) | {c.orphans} |"
            for c in found
        ),
        "",
        f"Left in /dev/shm: {len(left)}. Memory files (memfd) end with the processes that hold them.",
        "",
    ]


if __name__ == "__main__":
    main()
