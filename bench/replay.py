"""One saved batch of rollouts under several layouts, through the command line: the same HPT loss.

PYTHONPATH=. python bench/replay.py --out bench/results/replay.md
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.megatron.tiny import save_llama

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
    parser.add_argument("--tokenizer", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        lines = [
            "# A saved batch replayed",
            "",
            "One HPT batch of `hpt train debug.save=FILE` (rewards set by hand: a random model solves none), "
            "trained on with `debug.replay=FILE` in two updates; at the second the policy has moved. fp32.",
            "",
            *replay(Path(name), options.tokenizer),
        ]
    print("\n".join(lines), flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
