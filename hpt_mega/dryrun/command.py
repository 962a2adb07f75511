"""The verb `hpt dryrun`: its options, its tables and JSON.

What is examined is in examine.py.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hpt_mega.config import Config, ConfigError, compose

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from hpt_mega.dryrun.examine import Findings
    from hpt_mega.planning import Hardware

PROBLEMS = 1  # exit code of a job that would fail


def configure(parser: argparse.ArgumentParser) -> None:
    """Give the verb's parser its options."""
    parser.description = (
        "Examine a job of any size without a GPU: ranks are built under a fake process group without data, "
        "names and shapes compared with the model's tensors, memory estimated, the config's numbers checked."
    )
    parser.epilog = (
        "example: hpt dryrun experiment=hpt_70b --hardware h100; hpt dryrun experiment=hpt_moe --ranks all; "
        "exit code 0: nothing wrong, 1: problems, 2: not a config"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for hpt train")
    parser.add_argument("--hardware", default="h100", help="whose memory it has to fit in (h100)")
    parser.add_argument(
        "--ranks",
        default="typical",
        help="which to build: numbers with commas, all, or typical (one a stage, each share of the experts)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    begun = time.perf_counter()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a dry run is the same on a machine with GPUs
    warnings.filterwarnings("ignore", module="megatron")
    cfg = compose(options.overrides)

    from hpt_mega.dryrun.examine import examine
    from hpt_mega.planning import PlanError, hardware

    try:
        gpu = hardware(options.hardware)
    except PlanError as error:
        raise ConfigError(str(error)) from error
    found = examine(cfg, gpu, _ranks(options.ranks, cfg.parallel.world_size))
    seconds = time.perf_counter() - begun
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if options.json:
        print(json.dumps(as_json(cfg, found) | {"seconds": seconds, "peak_gib": peak_gib}, indent=2))
    else:
        _print(cfg, found, gpu)
        built = f"{len(found.ranks)} of {cfg.parallel.world_size} ranks built"
        print(f"{built}: {seconds:.1f} s, {peak_gib:.2f} GiB")
    return PROBLEMS if found.problems else 0


def _ranks(text: str, world_size: int) -> list[int] | None:
    if text == "typical":
        return None
    if text == "all":
        return list(range(world_size))
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"--ranks {text}: expected numbers with commas, all or typical") from None


def as_json(cfg: Config, found: Findings) -> dict[str, Any]:
    """Memory in GiB."""
    return {
        "world_size": cfg.parallel.world_size,
        "problems": found.problems,
        "missing": found.missing,
        "covered": found.covered,
        "batch": vars(found.batch) if found.batch else None,
        "ranks": [
            {"rank": built.rank, "stage": built.stage, "layers": built.layers, "parameters": built.parameters}
            for built in found.ranks
        ],
        "stages": [stage.parts() | {"total": stage.total} for stage in found.stages],
    }


def _print(cfg: Config, found: Findings, gpu: Hardware) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    console.print(cfg.parallel.product)
    if found.stages:
        print_whole(_rows(found), f"{_TITLE} {gpu.memory_gib:.1f} on {gpu.name}", console)
        console.print("(estimated; parameters built)")
        console.print(found.covered)
    if found.batch:
        cut = found.batch
        console.print(
            f"a step: {cfg.trainer.questions_per_step} questions, {cut.questions} a replica, {cut.rollouts} "
            f"rollouts of at most {cut.longest} tokens; {cfg.trainer.updates_per_step} updates of at most "
            f"{cut.microbatches} micro-batches of {cut.row} tokens; {cut.epochs:.2f} epochs in "
            f"{cfg.trainer.steps} steps"
        )
    for line in found.missing:
        console.print(f"missing on this machine: {line}")
    for number, line in enumerate(found.problems, start=1):
        print(f"problem {number}: {line}", file=sys.stderr)
    if not found.problems:
        console.print("nothing wrong with the job" + ("; its files are not here" if found.missing else ""))


_TITLE = "a GPU of each stage, GiB of"


def _rows(found: Findings) -> list[list[str]]:
    """A head, and a row a stage."""
    built_by_stage = {built.stage: built for built in reversed(found.ranks)}
    rows = [["stage", "layers", "parameters", *found.stages[0].parts(), "total"]]
    for index, stage in enumerate(found.stages):
        built = built_by_stage.get(index)
        numbers = [*stage.parts().values(), stage.total]
        layers, parameters = (_span(built.layers), f"{built.parameters / 1e9:.3f} B") if built else ("", "")
        rows.append([str(index), layers, parameters, *(f"{gib:.1f}" for gib in numbers)])
    return rows


def print_whole(rows: Sequence[Sequence[str]], title: str, console: Console) -> None:
    """Print a table whose first row is its head: on its side where it is too wide, but never cut."""
    from rich.console import Console

    upright, lying = _table(rows, title), _table(list(zip(*rows, strict=True)), title)
    if _width(upright, console) > console.width and _width(lying, console) < _width(upright, console):
        upright = lying
    width = max(console.width, _width(upright, console))
    Console(file=console.file, width=width).print(upright)


def _table(rows: Sequence[Sequence[str]], title: str) -> Table:
    from rich.table import Column, Table

    table = Table(*(Column(name, no_wrap=True) for name in rows[0]), title=title)
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _width(table: Table, console: Console) -> int:
    return console.measure(table, options=console.options.update(max_width=10_000)).maximum


def _span(layers: tuple[int, ...]) -> str:
    """0-19 for twenty of them in a row, else how many."""
    if layers and layers[-1] - layers[0] + 1 == len(layers):
        return f"{layers[0]}-{layers[-1]}"
    return f"{len(layers)} in chunks"
