"""Where the time of a step goes, by phase and by torch's operations: bench/results/step_profile.md.

python bench/step_profile.py [--steps 3]   # HPT's step of the demo, in one process with all cores

The first step, which warms up, is not counted. What no operation of torch takes is Python's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
os.environ.setdefault("MASTER_PORT", "29539")

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from hpt_mega import worker
from hpt_mega.config import compose, save
from hpt_mega.telemetry.records import read
from hpt_mega.trainer import Trainer

SHARE = 0.01  # of a step, that an operation must take to be named


def measure(settings: Sequence[str], steps: int, run_dir: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds by phase and by operation, of all counted steps together."""
    cfg = compose([*settings, f"trainer.steps={steps + 1}", f"run_dir={run_dir}"])
    save(cfg, run_dir / "config.yaml")
    train_step = Trainer.train_step
    counted = schedule(wait=0, warmup=1, active=steps, repeat=1)
    with profile(activities=[ProfilerActivity.CPU], schedule=counted) as profiler:

        def profiled(trainer: Trainer) -> dict[str, Any]:
            record = train_step(trainer)
            profiler.step()
            return record

        Trainer.train_step = profiled  # type: ignore[method-assign]
        try:
            if worker.main(str(run_dir / "config.yaml")):
                sys.exit("the run did not come to its end")
        finally:
            Trainer.train_step = train_step  # type: ignore[method-assign]
    phases: dict[str, float] = {}
    for record in read(run_dir / "metrics.jsonl"):
        if record["step"] > 1:
            for name, seconds in record["timing"].items():
                phases[name] = phases.get(name, 0.0) + seconds
    for name in ("eval", "checkpoint"):  # of the last step alone
        phases["step"] -= phases.pop(name, 0.0)
    events = [event for event in profiler.key_averages() if not event.key.startswith("ProfilerStep")]
    return phases, {event.key: event.self_cpu_time_total / 1e6 for event in events}


def table(name: str, seconds: dict[str, float], whole: float, rest: str) -> list[str]:
    named = {one: took for one, took in seconds.items() if took >= SHARE * whole}
    small = sum(seconds.values()) - sum(named.values())
    rows = sorted(named.items(), key=lambda item: -item[1])
    rows += [(f"{len(seconds) - len(named)} others", small), (rest, whole - sum(seconds.values()))]
    return [
        f"| {name} | s | share |",
        "|---|---|---|",
        *(f"| {one} | {took:.2f} | {took / whole:.1%} |" for one, took in rows),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("bench/results/step_profile.md"))
    options = parser.parse_args()
    settings = (
        *("experiment=demo", "parallel=single", "trainer.eval_every=0", "trainer.save_every=0"),
        *("trainer.export_hf=false", "data.heldout_questions=1"),
    )
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        run_dir.mkdir()
        phases, operations = measure(settings, options.steps, run_dir)
    whole = phases.pop("step")
    lines = [
        "# Where the time of a step goes",
        "",
        f"`python bench/step_profile.py --steps {options.steps}`: the demo's HPT step in one process, "
        f"{options.steps} steps together;",
        f"torch {torch.__version__}, threads: {torch.get_num_threads()}; {whole:.1f} s, the profiler's own "
        "cost included.",
        "",
        *table("phase", phases, whole, "between phases"),
        *table("operation", operations, whole, "Python"),
    ]
    options.out.write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
