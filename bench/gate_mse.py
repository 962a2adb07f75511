"""Errors of the RL and the demonstration gradient, question by question: the ground of the gate inverse_mse.

    python bench/gate_mse.py --out bench/results/gate_mse.md

The enumerable policies of `hpt diagnose-gradient`: each question's estimates by n rollouts (dr_grpo) and by
one demonstration (sft), beside the true gradient of its pass rate.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from statistics import fmean

import torch

from hpt_mega.objective import algorithm, diagnosis
from hpt_mega.scheduler import gate

QUESTIONS, ROLLOUTS = 6, 8


def errors(row: str, resamplings: int, seed: int) -> list[tuple[float, float, float]]:
    """(pass rate, bias, variance) of each question, in units of the mean estimate: its scale is left free."""
    world = diagnosis.World(QUESTIONS, 0.0, seed)
    estimator = algorithm(row, aggregation="constant", length=1.0)
    truth_QW = world.true_gradient().reshape(QUESTIONS, -1)
    drawn = [diagnosis._estimate(estimator, world, ROLLOUTS) for _ in range(resamplings)]
    estimates_NQW = torch.stack(drawn).reshape(resamplings, QUESTIONS, -1)
    found = []
    for q, rate in enumerate((world.old_QS * world.reward_QS).sum(1).tolist()):
        mean, truth = estimates_NQW[:, q].mean(0), truth_QW[q]
        cosine = float(mean @ truth / (mean.norm() * truth.norm()))
        variance = float(estimates_NQW[:, q].var(0).sum() / mean.norm() ** 2)
        found.append((rate, math.sqrt(max(0.0, 1 - cosine**2)), variance))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--resamplings", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rl, sft = (
        [errors(row, options.resamplings, s) for s in range(options.seeds)] for row in ("dr_grpo", "sft")
    )
    lines = [
        "# Errors of the two gradients of a question",
        "",
        f"{ROLLOUTS} rollouts against one demonstration, {options.resamplings} resamplings, means over "
        f"{options.seeds} random policies. Bias (sine of the angle to the true gradient) and variance are "
        "relative to the mean estimate. The share that minimises the squared error of a sum of both, each "
        "scaled to the same size, is RL's error over the sum of both errors. RL's gradient is unbiased: its "
        "column is the noise of so many resamplings.",
        "",
        "| pass rate | RL bias | RL variance | SFT bias | SFT variance | best share of SFT | inverse_mse |",
        "|---|---|---|---|---|---|---|",
    ]
    for q in range(QUESTIONS):
        rate, rl_bias, rl_variance = (fmean(found[q][i] for found in rl) for i in range(3))
        _, sft_bias, sft_variance = (fmean(found[q][i] for found in sft) for i in range(3))
        errors_ = rl_bias**2 + rl_variance, sft_bias**2 + sft_variance
        _, beta = gate("inverse_mse")(torch.tensor([rate], dtype=torch.float64))
        lines.append(
            f"| {rate:.3f} | {rl_bias:.2f} | {rl_variance:.1f} | {sft_bias:.2f} | {sft_variance:.1f} "
            f"| {errors_[0] / sum(errors_):.2f} | {float(beta):.2f} |"
        )
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
