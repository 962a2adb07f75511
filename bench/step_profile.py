"""Where every 5 % of a step goes, by function and by kernel: bench/results/step_profile.md.

    PYTHONPATH=. python bench/step_profile.py --out bench/results/step_profile.md [--models 5m] [--steps 4]

A GRPO step as bench/peers.py takes it, with all cores. The first step warms up; the next ones are watched by
cProfile, which charges Python's own work too much, and as many again by torch's profiler.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import multiprocessing
import os
import pstats
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.peers import overrides, reward_path

ROOT = Path(__file__).parents[1]
SHOWN = 0.05  # of all time


@dataclass
class Profile:
    functions: dict[str, float]  # share of a function with all that it calls
    kernels: dict[str, float]  # share of an operation of torch without those that it calls
    phases: dict[str, float]  # of a step as the run's own metrics have it


def profile(settings: list[str], steps: int, run_dir: Path, out: Path) -> None:
    """Train in this process and write what was seen as JSON."""
    import torch

    from hpt_mega.lab.worker import train_here
    from hpt_mega.launch import single_rank_environment
    from hpt_mega.trainer import Trainer

    os.environ |= reward_path()
    os.environ |= single_rank_environment()
    python, train_step = cProfile.Profile(), Trainer.train_step
    torch_profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def watched(trainer: Trainer) -> dict[str, object]:
        if trainer.step == 0:
            return train_step(trainer)
        if trainer.step <= steps:
            return python.runcall(train_step, trainer)
        if trainer.step == steps + 1:
            torch_profiler.start()
        record = train_step(trainer)
        if trainer.step == 2 * steps + 1:
            torch_profiler.stop()
        return record

    Trainer.train_step = watched  # type: ignore[method-assign]
    train_here([*settings, f"trainer.steps={2 * steps + 1}", f"run_dir={run_dir}"])
    out.write_text(json.dumps([_functions(python), _kernels(torch_profiler), _phases(run_dir, steps)]))


def _functions(python: cProfile.Profile) -> dict[str, float]:
    stats = pstats.Stats(python).stats  # type: ignore[attr-defined]
    cumulative = {place: row[3] for place, row in stats.items()}
    whole = next(seconds for (_, _, name), seconds in cumulative.items() if name == "train_step")
    ours = {place: seconds for place, seconds in cumulative.items() if str(ROOT / "hpt_mega") in place[0]}
    return {f"{Path(file).relative_to(ROOT)} {name}": s / whole for (file, _, name), s in ours.items()}


def _kernels(torch_profiler: object) -> dict[str, float]:
    events = torch_profiler.key_averages()  # type: ignore[attr-defined]
    whole = sum(event.self_cpu_time_total for event in events)
    return {event.key: event.self_cpu_time_total / whole for event in events}


def _phases(run_dir: Path, steps: int) -> dict[str, float]:
    records = [json.loads(line)["timing"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    watched = records[2 : steps + 2]
    whole = sum(timing["step"] for timing in watched)
    return {
        name: sum(timing.get(name, 0.0) for timing in watched) / whole
        for name in watched[0]
        if name != "step"
    }


def section(model: str, steps: int) -> list[str]:
    """The lines of one model, which is trained in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        out = folder / "profile.json"
        settings = [*overrides(model, folder), "algorithm=grpo"]
        process = multiprocessing.get_context("spawn").Process(
            target=profile, args=(settings, steps, folder / "run", out)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{model}: exit code {process.exitcode}")
        seen = Profile(*json.loads(out.read_text()))
    return [
        f"\n## {model}\n",
        f"Phases: {', '.join(f'{name} {share:.0%}' for name, share in seen.phases.items())}.",
        *_table("function, with all that it calls", seen.functions),
        *_table("operation of torch, alone", seen.kernels),
    ]


def _table(title: str, shares: dict[str, float]) -> list[str]:
    shown = sorted((share, name) for name, share in shares.items() if share >= SHOWN)
    return [
        f"\n| {title} | share |",
        "|---|---|",
        *(f"| {name} | {share:.0%} |" for share, name in shown[::-1]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=("5m", "smollm2"), default=["5m", "smollm2"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = [
        "# Where a step's time goes",
        "",
        f"A GRPO step as in [peers.md](peers.md), {len(os.sched_getaffinity(0))} cores, {options.steps} "
        f"steps by cProfile and {options.steps} by torch's profiler; what takes {SHOWN:.0%} or more.",
    ]
    for model in options.models:
        lines += section(model, options.steps)
        options.out.write_text("\n".join(lines) + "\n")
    print(options.out.read_text())


if __name__ == "__main__":
    main()
