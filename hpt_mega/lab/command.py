"""The verb `hpt lab`: every method on small models at equal cost, with a report that compares them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hpt_mega.config import ConfigError

if TYPE_CHECKING:
    from hpt_mega.lab.config import LabConfig
    from hpt_mega.lab.grid import Run

METHODS = "methods"  # the folder of the main grid's runs; an ablation's has its name


def configure(parser: argparse.ArgumentParser) -> None:
    """Give the verb's parser its options."""
    parser.description = (
        "Pre-train small models on easy arithmetic, train each with every method and seed of conf/lab at "
        "equal steps and rollouts, and compare them. The same command goes on after a kill."
    )
    parser.epilog = "example: hpt lab --quick; hpt lab --sizes 1m --seeds 1 2; hpt lab --ablation gate"
    parser.add_argument("--quick", action="store_true", help="conf/lab/quick.yaml: ten minutes on two cores")
    parser.add_argument("--ablation", metavar="NAME", help="variants of HPT in place of the methods")
    parser.add_argument(
        "--sizes", nargs="+", metavar="SIZE", help="only these models of the lab; an ablation takes the first"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="only these seeds of the lab")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: runs/lab, or runs/lab_quick")
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="runs at a time, each on one core (default: all cores)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands, start nothing")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from hpt_mega.lab.config import read
    from hpt_mega.lab.grid import base_models, runs

    cfg = read("quick" if options.quick else "full")
    folder: Path = options.out or Path("runs") / ("lab_quick" if options.quick else "lab")
    home = f"ablation_{options.ablation}" if options.ablation else METHODS
    grid = cfg.only(options.sizes or cfg.sizes, options.seeds or cfg.seeds)
    if options.ablation:
        grid = grid.ablation(options.ablation)
    if options.workers < 1:
        raise ConfigError(f"--workers is {options.workers}, expected 1 or more")
    models, trained = base_models(grid, folder), runs(grid, folder, home)
    if options.dry_run:
        _show([*models, *trained])
        return 0
    failures = _do(cfg, grid, folder, models, trained, options.workers)

    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    if any(run.is_done for run in trained):
        from hpt_mega.telemetry.comparison import write_comparison

        print(f"report: {write_comparison([folder / home], folder / home)}")
    return 1 if failures else 0


def _do(
    cfg: LabConfig, grid: LabConfig, folder: Path, models: Sequence[Run], trained: Sequence[Run], workers: int
) -> list[str]:
    from hpt_mega.lab.config import keep
    from hpt_mega.lab.grid import prepare, reuse, runs
    from hpt_mega.lab.runner import execute, lock

    keep(cfg, folder)
    with lock(folder):
        prepare(grid, folder)
        reuse(trained, runs(cfg, folder, METHODS))
        failures = execute(models, workers, cfg.deadline_s)
        return failures or execute(trained, workers, cfg.deadline_s)


def _show(runs: Sequence[Run]) -> None:
    for run in runs:
        print(f"# {run.name}{': done' if run.is_done else ''}")
        for job in run.jobs:
            print(job.command)
