"""SIGKILL at random instants of a run, resumed each time: bench/results/crash.md.

python bench/crash.py [--kills 50] [--minutes 30]   # a toy model with the demo's tokenizer, one process, CPU
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from hpt_mega.checkpoint.store import CheckpointStore
from tests.toy import metrics, save_toy, settings

SAVE_EVERY = 3
OUT = Path(__file__).parent / "results" / "crash.md"


@dataclass
class Toll:
    """What the kills cost."""

    kills: int = 0
    in_write: int = 0  # while a checkpoint was being written
    lost: list[int] = field(default_factory=list)  # steps done and not in a checkpoint, by kill
    orphans: int = 0


def start(run_dir: Path, model: Path, steps: int) -> subprocess.Popen[bytes]:
    overrides = [
        *settings(model),
        *("parallel=single", f"trainer.steps={steps}", f"trainer.save_every={SAVE_EVERY}", "resume=auto"),
        f"run_dir={run_dir}",
    ]
    log = run_dir.with_suffix(".log").open("ab")
    command = [sys.executable, "-m", "hpt_mega.cli", "train", *overrides]
    return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)


def kill_at_random(run_dir: Path, process: subprocess.Popen[bytes], toll: Toll, dice: random.Random) -> bool:
    """Let it train, kill it at some instant of its next steps; False where it ended before."""
    begun = size(run_dir)
    while size(run_dir) <= begun:
        if process.poll() is not None:
            return False
        time.sleep(0.02)
    pause = time.monotonic() + dice.uniform(0, 6)
    while time.monotonic() < pause:
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(family, timeout=20)
    toll.kills += 1
    toll.orphans += len(alive)
    toll.in_write += bool(list((run_dir / "checkpoints").glob("*.partial")))
    done = metrics(run_dir)[-1]["step"]
    toll.lost.append(done - (CheckpointStore(run_dir, keep=2).latest() or 0))
    return True


def size(run_dir: Path) -> int:
    file = run_dir / "metrics.jsonl"
    return file.stat().st_size if file.is_file() else 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--minutes", type=float, default=30)
    options = parser.parse_args()
    dice, toll, begun = random.Random(7), Toll(), time.monotonic()
    shared = {path.name for path in Path("/dev/shm").iterdir()}
    with tempfile.TemporaryDirectory() as folder:
        root, steps = Path(folder), 2000
        model = save_toy(root / "toy")
        while toll.kills < options.kills and time.monotonic() - begun < options.minutes * 60:
            kill_at_random(root / "killed", start(root / "killed", model, steps), toll, dice)
            print(toll.kills, toll.lost[-1:], flush=True)
        # the schedule of the learning rate knows the number of steps, so the reference has the same
        done = metrics(root / "killed")
        reference = start(root / "whole", model, steps)
        while len(metrics(root / "whole")) < len(done) and reference.poll() is None:
            time.sleep(0.2)
        reference.terminate()
        reference.wait()
        whole = metrics(root / "whole")[: len(done)]
        same = whole == done
    left = {path.name for path in Path("/dev/shm").iterdir()} - shared
    mine = [name for name in left if "torch" in name or "hpt" in name]
    lines = [
        "# SIGKILL at random instants",
        "",
        "`python bench/crash.py`: a toy model (1.6 M parameters), one process, a checkpoint every",
        f"{SAVE_EVERY} steps, deterministic mode. After each kill the run is resumed; at the end its metrics",
        "are compared, bit for bit, with those of a run never killed.",
        "",
        "| kills | in a checkpoint's writing | steps | metrics equal | steps lost a kill, mean (most) "
        "| orphans | shared memory left |",
        "|---|---|---|---|---|---|---|",
        f"| {toll.kills} | {toll.in_write} | {len(done) - 1} | {'yes' if same else 'NO'} "
        f"| {sum(toll.lost) / len(toll.lost):.1f} ({max(toll.lost)}) | {toll.orphans} | {len(mine)} |",
        "",
    ]
    OUT.write_text("\n".join(lines))
    print("\n".join(lines))
    if not same or toll.orphans or mine or max(toll.lost) > SAVE_EVERY:
        sys.exit(1)


if __name__ == "__main__":
    main()
