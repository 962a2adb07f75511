"""Every parallel layout beside one process: gradients, the loss, five optimizer steps.

    PYTHONPATH=. python bench/layouts.py --out bench/results/layouts.md

The models, trajectories and layouts are those of tests/megatron/test_layouts.py: tiny, with sizes that are
unequal and odd; fp32 over gloo. All micro-batches are packed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import ranks
from tests.megatron import test_layouts as layouts
from tests.megatron.test_layouts import Case
from tests.megatron.tiny import build_policy, config, leave_job, save_llama, save_mixture
from tests.ranks import run_ranks

STEPS = 5
ranks.DEADLINE_S = 1500.0  # all layouts of a size run in one job
MORE = [  # beyond the layouts of the tests
    Case(tied=True, recompute="full"),
    Case(dp=2, distributed_optimizer=True, recompute="full"),
    Case(dp=2, tied=True, recompute="selective"),
    Case(cp=2, dp=2, tied=True, recompute="full"),
    Case(cp=4),
    Case(tp=2, pp=2, vpp=3, sequence_parallel=True),
    Case(pp=2, vpp=3, dp=2, distributed_optimizer=True),
    Case(cp=2, pp=2, vpp=3),
    Case(experts=True, recompute="full"),
    Case(experts=True, dp=2, distributed_optimizer=True),
    Case(experts=True, dp=2, cp=2, ep=4, recompute="selective"),
]
Found = dict[str, dict[str, Any]]


def curves(cases: Sequence[Case], folders: dict[str, Path]) -> dict[str, list[dict[str, float]]]:
    """For every case: loss, entropy and gradient norm of five steps on the same trajectories."""
    from hpt_mega.config import OptimizerConfig
    from hpt_mega.megatron.learner import Learner
    from hpt_mega.objective import algorithm

    found = {}
    for case in cases:
        cfg = config(case.parallel, optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0))
        cfg.trainer.tokens_per_microbatch = case.budget
        policy = build_policy(folders[case.model], cfg)
        estimator = algorithm("hpt", length=layouts.LENGTH)
        learner = Learner(cfg, policy.layout, policy.wrapped, policy.optimizer, estimator, layouts.VOCABULARY)
        # with old log-probabilities the ratio is not 1, and the loss moves with the weights
        mine = case.share(layouts.trajectories(), policy.layout.dp_rank)
        mine = [replace(t, old_logp=t.rollout_logp) for t in mine]
        steps = [learner.learn(mine, step) for step in range(STEPS)]
        names = ("loss", "entropy", "grad_norm")
        found[str(case)] = [{name: step[name] for name in names} for step in steps]
        leave_job()
    return found


def run(cases: Sequence[Case], folders: dict[str, Path]) -> tuple[Found, dict[str, Any]]:
    """Gradients by HF name, metrics and curves of every case, over its ranks."""
    found: Found = {}
    curve: dict[str, Any] = {}
    for size in sorted({case.parallel.world_size for case in cases}):
        chosen = [case for case in cases if case.parallel.world_size == size]
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            gradients = run_ranks(layouts.megatron_gradients, size, Path(first), chosen, folders)
            steps = run_ranks(curves, size, Path(second), chosen, folders)
        for case in map(str, chosen):
            merged: dict[str, Tensor] = {}
            for rank in gradients:
                merged |= rank[case]["gradients"]
            found[case] = {"gradients": merged, "metrics": gradients[0][case]["metrics"]}
            curve[case] = steps[0][case]
    return found, curve


def table(cases: Sequence[Case], folders: dict[str, Path]) -> list[str]:
    found, curve = run(cases, folders)
    references = {
        name: layouts.reference(folder, experts=name == "experts") for name, folder in folders.items()
    }
    alone = {
        case.model: str(case)
        for case in layouts.LAYOUTS
        if case == Case(tied=case.tied, experts=case.experts)
    }
    lines = [
        "| model | layout | options | gradient beside one process | beside transformers | loss of the batch "
        "| five steps: loss, entropy, gradient norm |",
        "|---|---|---|---|---|---|---|",
    ]
    worst = [0.0] * 4
    for case in cases:
        one, here = found[alone[case.model]], found[str(case)]
        reference = references[case.model]
        assert here["gradients"].keys() == one["gradients"].keys() == reference.gradients.keys()
        figures = [
            largest(here["gradients"], one["gradients"]) / reference.largest,
            largest(here["gradients"], reference.gradients) / reference.largest,
            abs(here["metrics"]["sum/loss"] / one["metrics"]["sum/loss"] - 1),
            max(
                abs(mine[name] / theirs[name] - 1)
                for mine, theirs in zip(curve[str(case)], curve[alone[case.model]], strict=True)
                for name in mine
            ),
        ]
        worst = [max(pair) for pair in zip(worst, figures, strict=True)]
        lines.append(
            f"| {case.model} | {sizes(case)} | {options(case)} | "
            + " | ".join(f"{figure:.1e}" for figure in figures)
            + " |"
        )
    lines.append("| **largest** | | | " + " | ".join(f"**{figure:.1e}**" for figure in worst) + " |")
    return lines


def largest(given: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((gradient - expected[name]).abs().max()) for name, gradient in given.items())


def sizes(case: Case) -> str:
    words = [f"{name}{getattr(case, name)}" for name in ("tp", "cp", "pp", "vpp", "ep", "etp", "dp")]
    return " ".join(word for word in words if not word.endswith("1")) or "one process"


def options(case: Case) -> str:
    words = [
        name.replace("_", " ")
        for name in ("sequence_parallel", "distributed_optimizer", "overlap")
        if getattr(case, name)
    ]
    words += [f"recompute {case.recompute}"] if case.recompute != "none" else []
    words += [f"layers {case.stage_layers}"] if case.stage_layers else []
    return ", ".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cases = [*layouts.LAYOUTS, *MORE]
    with tempfile.TemporaryDirectory() as name:
        folders = {
            "untied": save_llama(Path(name) / "untied", tied=False),
            "tied": save_llama(Path(name) / "tied", tied=True),
            "experts": save_mixture(Path(name) / "experts"),
        }
        lines = [
            "# Parallel layouts",
            "",
            f"torch {torch.__version__}, gloo, fp32, packed micro-batches; {len(cases)} layouts. Gradients: "
            "the largest difference over the largest gradient. Loss and curves: relative.",
            "",
            *table(cases, folders),
        ]
    print("\n".join(lines), flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
