"""Steps a minute with samples that lag behind by 0, 1 and 2 steps: bench/results/staleness.md.

    python bench/staleness.py --out bench/results/staleness.md

`hpt train` of a toy model (1.6 M parameters) with one real vLLM, turn by turn. Every trajectory that is
trained on is kept and its age looked at. About 5 minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from hpt_mega.replay import read_batches
from hpt_mega.telemetry.records import read
from hpt_mega.trajectory import Source
from tests.toy import save_toy, settings

STEPS, WARM_UP = 16, 4
DEADLINE_S = 2400.0  # of a run, on a busy machine
STALENESS = (0, 1, 2)


def train(model: Path, root: Path, staleness: int) -> tuple[list[float], list[int]]:
    """Seconds of each step after the warm-up, and how many steps each trained sample lagged behind."""
    run_dir, kept = root / f"run{staleness}", root / f"trained{staleness}.jsonl"
    command = [
        *(sys.executable, "-m", "hpt_mega.cli", "train", *settings(model)),
        *(f"run_dir={run_dir}", f"debug.save={kept}", f"trainer.steps={STEPS}", "parallel=single"),
        *("rollout=vllm", f"rollout.staleness={staleness}", "precision=fp32", "gate=both"),
        *("trainer.deterministic=false", "trainer.questions_per_step=8"),
        *("rollout.rollouts_per_question=8", "rollout.max_new_tokens=64", "rollout.server.bucket_mib=8"),
        *(f"rollout.server.start_deadline_s={DEADLINE_S}", "rollout.server.answer_deadline_s=120"),
    ]
    subprocess.run(command, check=True, timeout=DEADLINE_S)
    records = [record for record in read(run_dir / "metrics.jsonl") if record["step"] > WARM_UP]
    ages = [
        step - 1 - trajectory.policy_version
        for step, batch in read_batches(kept).items()
        for trajectory in batch
        if trajectory.source is Source.ONLINE
    ]
    assert len(ages) == STEPS * 64, f"{len(ages)} rollouts were trained on, expected {STEPS * 64}"
    assert max(ages) <= staleness, f"a sample lagged {max(ages)} steps behind, the bound is {staleness}"
    return [record["timing"]["step"] for record in records], ages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = save_toy(root / "toy", head_dim=32)
        synchronous = 0.0
        for staleness in STALENESS:
            seconds, ages = train(model, root, staleness)
            rate = 60 / statistics.median(seconds)
            synchronous = synchronous or rate
            spread = ", ".join(f"{age}: {ages.count(age)}" for age in sorted(set(ages)))
            lines.append(
                f"| {staleness} | {rate:.1f} | {rate / synchronous:.2f}x | {min(seconds):.2f} to "
                f"{max(seconds):.2f} s | {spread} | {max(ages)} |"
            )
            print(lines[-1], flush=True)
    text = [
        "# Samples that lag behind",
        "",
        f"`python bench/staleness.py`: a toy model, one vLLM, 64 samples of 64 tokens a step, {STEPS} steps,",
        f"of which the first {WARM_UP} are left out of the times. Trainer and server share the same cores.",
        "",
        "| rollout.staleness | steps a minute | of synchronous | a step | trained samples by age | oldest |",
        "|---|---|---|---|---|---|",
        *lines,
    ]
    given.out.write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
