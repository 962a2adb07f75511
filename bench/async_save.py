"""What a checkpoint costs the demo's training, written at once or meanwhile: bench/results/async_save.md.

python bench/async_save.py [--rounds 5]   # one process; saves and steps turn by turn
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AutoTokenizer

from hpt_mega.checkpoint.store import CheckpointStore
from hpt_mega.config import compose
from hpt_mega.data.questions import load_questions
from hpt_mega.launch import single_rank_environment
from hpt_mega.megatron.learner import Learner
from hpt_mega.scheduler.blend import demonstration
from hpt_mega.trajectory import Trajectory
from hpt_mega.worker import build_learner
from tests.megatron.tiny import build_policy

STEPS = 3  # after each save, in which it can end
SEQUENCES = 6
SETTINGS = ("experiment=demo", "parallel=single", "algorithm=sft", "gate=demonstrations", "optimizer.lr=1e-7")


def prepare() -> tuple[Learner, list[Trajectory]]:
    cfg = compose(SETTINGS)
    policy = build_policy(Path(cfg.model.path), cfg, train=False)
    questions = load_questions(cfg.data, AutoTokenizer.from_pretrained(cfg.model.path)).train[:SEQUENCES]
    items = [demonstration(question, index, 0) for index, question in enumerate(questions)]
    return build_learner(cfg, policy.layout, policy.model, policy.shape), items


def timed(
    learner: Learner, items: list[Trajectory], store: CheckpointStore, mode: str, number: int
) -> list[float]:
    """Seconds until training goes on, of the first step then, and of all until the save is complete."""
    learner.cfg.trainer.async_save = mode == "meanwhile"
    begun = time.perf_counter()
    if mode != "none":
        store.begin(number, lambda folder: learner.begin_save(folder, {"step": number}))
        if mode == "at once":
            store.settle()
    marks = [time.perf_counter()]
    for _ in range(STEPS):
        learner.learn(items, 0)
        store.settle(wait=False)
        marks.append(time.perf_counter())
    store.settle()
    return [marks[0] - begun, marks[1] - marks[0], time.perf_counter() - begun]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("bench/results/async_save.md"))
    options = parser.parse_args()
    os.environ |= single_rank_environment()
    rounds: int = options.rounds
    learner, items = prepare()
    modes = ("none", "at once", "meanwhile")
    seconds: dict[str, list[list[float]]] = {mode: [] for mode in modes}
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder), keep=1)
        for number in range(rounds + 1):
            for mode in modes:
                found = timed(learner, items, store, mode, number)
                if number:  # the first is warm-up
                    seconds[mode].append(found)
        (last,) = store.steps()
        size = sum(path.stat().st_size for path in store.path(last).rglob("*"))
    rows = {
        mode: [statistics.median(column) for column in zip(*seconds[mode], strict=True)] for mode in modes
    }
    pauses = [b[0] / a[0] for a, b in zip(seconds["meanwhile"], seconds["at once"], strict=True)]
    lines = [
        "# Saving at once and meanwhile",
        "",
        f"`python bench/async_save.py --rounds {rounds}`: the demo model in one process, checkpoints of",
        f"{size / 2**30:.2f} GiB, {STEPS} steps of {SEQUENCES} demonstrations after each; medians, turn by",
        f"turn; torch {torch.__version__}, threads: {torch.get_num_threads()}.",
        "",
        f"| checkpoint | pause, s | next step, s | pause and {STEPS} steps, complete, s |",
        "|---|---|---|---|",
        *(f"| {mode} | {row[0]:.2f} | {row[1]:.2f} | {row[2]:.2f} |" for mode, row in rows.items()),
        "",
        f"The pause is {statistics.median(pauses):.1f} times shorter ({min(pauses):.1f} to {max(pauses):.1f}",
        "in single rounds).",
        "",
    ]
    options.out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
