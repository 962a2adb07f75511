"""Time and memory of `hpt dryrun` at full size, and what five broken jobs are told: bench/results/dryrun.md.

python bench/dryrun.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

JOBS = (("hpt_7b", 8), ("hpt_70b", 64), ("hpt_moe", 256))
BROKEN = (
    ("experiment=hpt_70b", "parallel.tp=6"),
    ("experiment=hpt_moe", "parallel.ep=24"),
    ("experiment=hpt_70b", "trainer.questions_per_step=129"),
    ("experiment=hpt_70b", "parallel.pp=1", "parallel.dp=1", "parallel.recompute=none"),
    ("experiment=hpt_7b", "data.max_prompt_tokens=130000"),
)


def dryrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hpt_mega.cli", "dryrun", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("bench/results/dryrun.md"))
    out: Path = parser.parse_args().out
    lines = [
        "# Dry runs of the jobs for GPUs",
        "",
        "`python bench/dryrun.py`, on 2 CPU cores that other work shared; one process, no GPU, no weights.",
        "Fullest stage: the planner's estimate for its GPU.",
        "",
        "| job | GPUs | ranks built | seconds | peak GiB | fullest stage, GiB of 79.6 | problems |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, gpus in JOBS:
        for ranks in ("typical", "all") if gpus <= 64 else ("typical",):
            found = json.loads(dryrun(f"experiment={name}", "--ranks", ranks, "--json").stdout)
            fullest = max(stage["total"] for stage in found["stages"])
            lines.append(
                f"| {name} | {gpus} | {len(found['ranks'])} ({ranks}) | {found['seconds']:.1f} "
                f"| {found['peak_gib']:.2f} | {fullest:.1f} | {len(found['problems'])} |"
            )
            print(lines[-1], flush=True)
    lines += ["", "## Broken on purpose", ""]
    for overrides in BROKEN:
        ended = dryrun(*overrides)
        assert ended.returncode == 1, ended
        lines += [
            f"`hpt dryrun {' '.join(overrides)}`",
            "",
            *(f"> {x}" for x in ended.stderr.splitlines()),
            "",
        ]
    out.write_text("\n".join(lines))


if __name__ == "__main__":
    main()
