"""Every parallel layout beside one process: gradients, the loss of a saved batch, five optimizer steps.

    PYTHONPATH=. python bench/layouts.py --out bench/results/layouts.md

The models, trajectories and layouts are those of tests/megatron/test_layouts.py: tiny, with sizes that are
unequal and odd; fp32 over gloo. All micro-batches are packed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
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
    words = [f"{name}{getattr(case, name)}" for name in ("tp", "cp", "pp", "vpp", "ep", "dp")]
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


REPLAYED = [
    "parallel.pp=1",
    "parallel.pp=1 parallel.tp=2 parallel.sequence_parallel=true",
    "parallel.pp=2 parallel.vpp=3",
    "parallel.pp=1 parallel.cp=2",
    "parallel.pp=1 parallel.dp=2 parallel.distributed_optimizer=true",
    "parallel.pp=1 parallel.dp=4 parallel.recompute=full trainer.tokens_per_microbatch=333",
]


def replay(folder: Path, tokenizer: Path) -> list[str]:
    """One rollout batch of `hpt train`, saved and replayed under other layouts, through the command line."""
    batch = folder / "batch.jsonl"
    save_llama(folder / "model", tied=True, vocabulary=49152)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder / "model")
    shutil.copy(tokenizer / "chat_template.jinja", folder / "model")
    common = [
        "experiment=tiny",
        f"model.path={folder / 'model'}",
        "precision=fp32",
        "trainer.steps=1",
        "trainer.questions_per_step=8",
        "trainer.updates_per_step=2",
        "trainer.export_hf=false",
        "trainer.save_every=0",
        "gate=both",
        "optimizer.lr=1e-3",
        "data.heldout_questions=1",
    ]
    hpt(folder / "saved", *common, "parallel.pp=1", f"debug.save={batch}")
    lines = [json.loads(line) for line in batch.read_text().splitlines()]
    for number, line in enumerate(line for line in lines if line["source"] == 0):
        line["reward"] = float(number % 3 == 0)
    batch.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [
        "| layout | loss, both updates | beside one process | entropy | gradient norm |",
        "|---|---|---|---|---|",
    ]
    base: dict[str, float] = {}
    for number, layout in enumerate(REPLAYED):
        record = hpt(folder / f"replay{number}", *common, *layout.split(), f"debug.replay={batch}")
        base = base or record
        apart = [f"{abs(record[name] / base[name] - 1):.1e}" for name in ("loss", "entropy", "grad_norm")]
        words = layout.replace("parallel.", "").replace("trainer.", "").replace("pp=1", "").strip()
        rows.append(f"| {words or 'one process'} | {record['loss']:.9f} | {' | '.join(apart)} |")
    return rows


def hpt(run_dir: Path, *overrides: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "hpt_mega.cli", "train", *overrides, f"run_dir={run_dir}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    record: dict[str, Any] = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return record


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=Path("models/smollm2-135m-instruct"))
    options_ = parser.parse_args()
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
            "",
            "One HPT batch of `hpt train debug.save=FILE` (rewards set by hand: a random model solves none), "
            "trained on with `debug.replay=FILE` in two updates; at the second the policy has moved.",
            "",
            *replay(Path(name), options_.tokenizer),
        ]
    print("\n".join(lines), flush=True)
    if options_.out:
        options_.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
