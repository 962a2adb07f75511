"""tools/prepare_data.py on a parquet of OpenR1-Math-46k-8192's schema: seconds and memory.

    python bench/prepare_data.py --rows 46000 --out bench/results/prepare_data.md

The rows are made here: word problems of reasoning-gym for words, lengths drawn around those that the data set
reports (prompts of some 100 tokens, demonstrations of up to 8,192).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
from pyarrow import parquet

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "models/smollm2-135m-instruct"
TEXT = {"content": pa.string(), "role": pa.string()}
MESSAGES = pa.list_(pa.struct(TEXT))
SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": MESSAGES,
        "target": MESSAGES,
        "ability": pa.string(),
        "reward_model": pa.struct({"ground_truth": pa.string(), "style": pa.string()}),
        "extra_info": pa.struct({"index": pa.int64(), "split": pa.string()}),
    }
)
WORDS = [
    "the",
    "of",
    "so",
    "we",
    "have",
    "that",
    "is",
    "equal",
    "to",
    "x",
    "y",
    "n",
    "then",
    "wait",
    "check",
    "sum",
    "$x^2+1$",
    "12",
    "345",
    r"\frac{3}{7}",
    r"\sqrt{2}",
    "integer",
    "divide",
    r"\boxed{7}",
]


def write(path: Path, rows: int) -> None:
    """Rows like LUFFY's, of a system and a user message; every 97th without a demonstration."""
    draw = random.Random(0)
    with parquet.ParquetWriter(path, SCHEMA) as writer:
        for start in range(0, rows, 1000):
            part = [_row(i, draw) for i in range(start, min(rows, start + 1000))]
            writer.write_table(pa.Table.from_pylist(part, SCHEMA))


def _row(index: int, draw: random.Random) -> dict[str, Any]:
    words = min(4500, int(draw.lognormvariate(7.2, 0.6)))  # a median of 1,340 words, near 2,600 tokens
    target = [
        {"role": "assistant", "content": "<think>\n" + " ".join(draw.choices(WORDS, k=words)) + "</think>"}
    ]
    return {
        "data_source": "openr1",
        "prompt": [
            {"role": "system", "content": "Your task is to follow a systematic reasoning process."},
            {
                "role": "user",
                "content": f"Question {index}: " + " ".join(draw.choices(WORDS, k=draw.randint(20, 120))),
            },
        ],
        "target": None if index % 97 == 0 else target,
        "ability": "math",
        "reward_model": {"ground_truth": str(index), "style": "rule"},
        "extra_info": {"index": index, "split": "default"},
    }


def _watched(command: list[str]) -> tuple[str, int, float]:
    """What a command prints, the most bytes it and its children had resident at once, their CPU seconds."""
    peak = 0
    cpu: dict[int, float] = {}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output)
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                family = [tree, *tree.children(recursive=True)]
                peak = max(peak, sum(one.memory_info().rss for one in family))
                cpu |= {one.pid: sum(one.cpu_times()[:2]) for one in family}
            time.sleep(0.2)
        if process.returncode:
            raise SystemExit(process.returncode)
        output.seek(0)
        return output.read(), peak, sum(cpu.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=46_000)
    parser.add_argument("--benchmarks", nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "openr1.parquet"
        write(source, options.rows)
        command = [
            *(
                sys.executable,
                str(ROOT / "tools/prepare_data.py"),
                "--data",
                str(source),
                "--columns",
                "openr1",
            ),
            *("--drop-system", "--tokenizer", str(MODEL), "--out", str(Path(folder) / "out")),
            *(["--benchmarks", *options.benchmarks] if options.benchmarks else []),
        ]
        printed, peak, cpu = _watched(command)
        printed = printed.replace(folder, "FOLDER")
        size = source.stat().st_size / 2**20
    text = (
        f"# Preparing data\n\n`python bench/prepare_data.py --rows {options.rows}`, {os.cpu_count()} cores, "
        f"{os.cpu_count()} worker processes, parquet of {size:.0f} MiB, tokenizer of SmolLM2-135M.\n\n"
        f"```\n{printed}```\n\n{cpu:.0f} CPU seconds. Peak memory of all processes together: "
        f"{peak / 2**20:.0f} MiB resident, shared pages counted once a process.\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
