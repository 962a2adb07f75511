"""A GRPO step of the 5 M model beside TRL's as the step grows: bench/results/peers_scaling.md.

    pip install --no-deps trl==1.16.0
    PYTHONPATH=. python bench/peers_scaling.py --out bench/results/peers_scaling.md [--rounds 2] [--steps 4]

Contenders, questions and rewards are those of bench/peers.py. One of samples, questions and length changes at
a time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from bench.peers import CONTENDERS, QUESTIONS, SAMPLES, Measured, overrides

OURS, PEER = "ours, GRPO", "TRL, GRPO"
LENGTH = 64  # of a response at most
CASES = [
    (QUESTIONS, SAMPLES, LENGTH),
    (QUESTIONS, 4, LENGTH),
    (QUESTIONS, 16, LENGTH),
    (4, SAMPLES, LENGTH),
    (16, SAMPLES, LENGTH),
    (QUESTIONS, SAMPLES, 16),
    (QUESTIONS, SAMPLES, 192),  # the model has 256 positions
]


def measure(case: tuple[int, int, int], contender: str, steps: int) -> Measured:
    questions, samples, length = case
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = [
            *overrides("5m", folder),
            f"trainer.questions_per_step={questions}",
            f"rollout.rollouts_per_question={samples}",
            f"rollout.max_new_tokens={length}",
        ]
        return CONTENDERS[contender](settings, steps, folder)


def line(case: tuple[int, int, int], found: dict[str, Measured]) -> str:
    questions, samples, length = case
    ours, peer = (statistics.median(found[name].step_s) for name in (OURS, PEER))
    each = [statistics.fmean(found[name].tokens) / (questions * samples) for name in (OURS, PEER)]
    ratios = sorted(theirs / ours for theirs in found[PEER].step_s)
    return (
        f"| {questions} | {samples} | {length} | {each[0]:.0f}, {each[1]:.0f} | {ours:.2f} | {peer:.2f} "
        f"| {peer / ours:.2f}x ({ratios[0]:.2f}, {ratios[-1]:.2f}) |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = [
        "# A growing step beside TRL's",
        "",
        f"The 5 M model of [peers.md](peers.md), GRPO, {len(os.sched_getaffinity(0))} cores, "
        f"{options.rounds} rounds of {options.steps} counted steps, the contenders turn by turn; random "
        "weights end a response by chance.",
        "",
        "| questions | samples each | tokens at most | tokens a sample, ours and TRL's | ours, s | TRL, s "
        "| TRL of ours: median (lowest, highest step) |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in CASES:
        found = {name: Measured() for name in (OURS, PEER)}
        for _ in range(options.rounds):
            for name, one in found.items():
                one.add(measure(case, name, options.steps))
        lines.append(line(case, found))
        print(lines[-1], flush=True)
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
