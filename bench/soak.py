"""Memory over a long run: bench/results/soak.md.

python bench/soak.py [--minutes 30] [KEY=VALUE...]   # experiment=demo; RSS of every rank from health.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WARM_UP = 10
OUT = Path(__file__).parent / "results" / "soak.md"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("overrides", nargs="*", default=["experiment=demo"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [sys.executable, "-m", "hpt_mega.cli", "train", *options.overrides, f"run_dir={run_dir}"]
        process = subprocess.Popen([*command, "trainer.steps=100000"], stdout=subprocess.DEVNULL)
        end = time.monotonic() + options.minutes * 60
        while time.monotonic() < end and process.poll() is None:
            time.sleep(1)
        process.terminate()
        process.wait()
        lines = (run_dir / "health.jsonl").read_text().splitlines()
    used = [json.loads(line)["rss"] for line in lines][WARM_UP:]
    rows = []
    for rank, series in enumerate(zip(*used, strict=True)):
        rows.append(
            f"| {rank} | {len(series)} | {series[0] / 2**20:.0f} | {series[-1] / 2**20:.0f} "
            f"| {slope(series) * 100 / series[0]:+.2%} |"
        )
    called = f"`python bench/soak.py --minutes {options.minutes:g} {' '.join(options.overrides)}`"
    text = "\n".join(
        [
            "# Memory over a long run",
            "",
            f"{called}, after {WARM_UP}",
            "steps of warm-up; growth is the slope of a straight line through all steps.",
            "",
            "| rank | steps | first, MiB | last, MiB | growth of RSS in 100 steps |",
            "|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    OUT.write_text(text)
    print(text)


def slope(series: tuple[int, ...]) -> float:
    """Least squares, bytes a step."""
    middle = (len(series) - 1) / 2
    mean = sum(series) / len(series)
    above = sum((i - middle) * (value - mean) for i, value in enumerate(series))
    return above / sum((i - middle) ** 2 for i in range(len(series)))


if __name__ == "__main__":
    main()
