"""Memory over a long run: bench/results/soak.md.

python bench/soak.py [--minutes 30] [--runs demo toy]   # beside each other; RSS from health.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.toy import save_toy, settings

WARM_UP = 10
TOGETHER = 10  # memory goes up and down within so many steps, as the allocator gives it back
# fewer samples a step than the demo's, for more steps: what one of them leaves behind is what counts
SMALL_STEPS = (
    "trainer.questions_per_step=2",
    "rollout.rollouts_per_question=4",
    "rollout.max_new_tokens=16",
    "data.heldout_questions=8",
    "trainer.save_every=50",
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--runs", nargs="+", choices=("demo", "toy"), default=["demo", "toy"])
    parser.add_argument("--out", type=Path, default=Path("bench/results/soak.md"))
    options = parser.parse_args()
    minutes: float = options.minutes
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        toy = [*settings(save_toy(root / "model")), "trainer.save_every=50"]
        known = {"demo": ["experiment=demo", *SMALL_STEPS], "toy": toy}
        runs = {name: known[name] for name in options.runs}
        processes = [start(overrides, root / name) for name, overrides in runs.items()]
        end = time.monotonic() + minutes * 60
        while time.monotonic() < end:
            for name, process in zip(runs, processes, strict=True):
                if process.poll() is not None:
                    said = (root / f"{name}.out").read_text()[-2000:]
                    raise SystemExit(f"the {name} run ended with code {process.returncode}:\n{said}")
            time.sleep(1)
        for process in processes:
            process.terminate()
            process.wait()
        rows = [row for name in runs for row in table(name, root / name)]
    text = "\n".join(
        [
            "# Memory over a long run",
            "",
            f"`python bench/soak.py --minutes {minutes:g} --runs {' '.join(runs)}`: the demo (2 questions",
            "a step, 4 samples of 16 tokens each), the toy model of tests/toy.py; a checkpoint every 50",
            f"steps, at once, parallel=single, after {WARM_UP} steps of warm-up. Growth is the slope of a",
            f"straight line through the smallest, or largest, of each {TOGETHER} steps, over their mean, in",
            "100 steps. The smallest is what is held, all above it what the allocator keeps.",
            "",
            f"| run | rank | steps | smallest of {TOGETHER}, MiB: first, last | growth "
            "| largest: first, last | growth |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
    options.out.write_text(text)
    print(text)


def start(overrides: list[str], run_dir: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "hpt_mega.cli", "train", *overrides, "parallel=single"]
    command += ["trainer.steps=100000", f"run_dir={run_dir}"]
    with run_dir.with_suffix(".out").open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)


def table(name: str, run_dir: Path) -> list[str]:
    """A row a rank."""
    lines = (run_dir / "health.jsonl").read_text().splitlines()
    used = [json.loads(line)["rss"] for line in lines][WARM_UP:]
    rows = []
    for rank, series in enumerate(zip(*used, strict=True)):
        cells = [name, str(rank), str(len(series))]
        tens = [series[i : i + TOGETHER] for i in range(0, len(series) - TOGETHER + 1, TOGETHER)]
        for ends in ([min(ten) for ten in tens], [max(ten) for ten in tens]):
            cells += [f"{ends[0] / 2**20:.0f}, {ends[-1] / 2**20:.0f}"]
            cells += [f"{100 / TOGETHER * growth(ends):+.2%}"]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def growth(series: list[int]) -> float:
    """The slope by least squares, from one to the next, as a share of the mean."""
    slope: float = np.polyfit(range(len(series)), series, 1)[0]
    return slope / fmean(series)


if __name__ == "__main__":
    main()
