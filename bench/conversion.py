"""Conversion beside cp of the same files, in turns, with the sources in the page cache.

    python bench/conversion.py --gb 1 --repeats 5 --folders build /dev/shm

Makes a bf16 Llama of random bits in a folder and removes it in the end. Each turn: cp, cp and an fsync of
each copy, `hpt convert`, and the same with fsync doing nothing (Debian's eatmydata), so that it ends where cp
does; for both directions; what is dirty is written out before each. One thread a process.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hpt_mega.checkpoint.hf import HFWriter
from hpt_mega.resharding.mapping import family_for
from hpt_mega.spec import Spec

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "vocab_size": 32_001,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
LAYER_BYTES = 2 * (2 * 2048 * 2048 + 2 * 256 * 2048 + 3 * 5632 * 2048 + 2 * 2048)
OUTSIDE_BYTES = 2 * (2 * 32_001 * 2048 + 2048)
SHARD_BYTES = 500_000_000
LAYOUT = ("--tp", "2", "--pp", "2")
PROCESSES = (1, 2)
TABLE = re.compile(
    r"(?<=<!-- bench/conversion.py begins -->\n).*?(?=<!-- bench/conversion.py ends -->)", re.S
)


@dataclass
class Direction:
    """Seconds of each turn."""

    where: str
    processes: int
    name: str
    nbytes: int = 0
    cp: list[float] = field(default_factory=list)
    cp_synced: list[float] = field(default_factory=list)
    convert: list[float] = field(default_factory=list)
    unsynced: list[float] = field(default_factory=list)  # as cp, which leaves the writing to the kernel

    def row(self) -> str:
        def speed(seconds: list[float]) -> str:
            each = sorted(self.nbytes / 1e9 / one for one in seconds)
            return f"{statistics.median(each):.2f} ({each[0]:.2f} to {each[-1]:.2f})"

        def ratio(beside: list[float], ours: list[float]) -> str:
            return f"{statistics.median(beside) / statistics.median(ours):.2f}x"

        return (
            f"| {self.where} | {self.processes} | {self.name} | {speed(self.cp)} | {speed(self.unsynced)} | "
            f"{ratio(self.cp, self.unsynced)} | {speed(self.cp_synced)} | {speed(self.convert)} | "
            f"{ratio(self.cp_synced, self.convert)} |"
        )


def make_model(folder: Path, gigabytes: float) -> None:
    layers = max(2, round((gigabytes * 1e9 - OUTSIDE_BYTES) / LAYER_BYTES / 2) * 2)
    config = CONFIG | {"num_hidden_layers": layers}
    family = family_for(config)
    shape = family.read_shape(config)
    shapes = {
        name: sizes for entry in family.entries(shape) for name, sizes in entry.hf_shapes(shape).items()
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    specs = {name: Spec(torch.bfloat16, sizes) for name, sizes in shapes.items()}
    with HFWriter(folder, specs, shard_bytes=SHARD_BYTES) as writer:
        for name, spec in specs.items():
            bits = torch.randint(-(2**15), 2**15, spec.shape, dtype=torch.int16)
            writer.write(name, bits.view(torch.bfloat16))
        writer.finish()


def turn(direction: Direction, source: Path, out: Path, verb: list[str]) -> None:
    """One measurement of each kind; leaves the converted folder in `out`."""
    copy = out.with_name("copy")
    files = [path for path in source.rglob("*") if path.is_file()]
    direction.nbytes = sum(path.stat().st_size for path in files)
    for path in files:  # into the page cache
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass

    def cp() -> None:
        subprocess.run(["cp", "-r", source, copy], check=True)

    def cp_synced() -> None:
        cp()
        subprocess.run(["sync", *(path for path in copy.rglob("*") if path.is_file())], check=True)

    for action, seconds in ((cp, direction.cp), (cp_synced, direction.cp_synced)):
        seconds.append(timed(action))
        shutil.rmtree(copy)
    verb = [*verb, "--processes", str(direction.processes)]
    for under, seconds in ((["eatmydata"], direction.unsynced), ([], direction.convert)):
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        seconds.append(convert(under, verb, out))


def timed(action: Callable[[], object]) -> float:
    os.sync()
    begin = time.monotonic()
    action()
    return time.monotonic() - begin


def convert(under: list[str], verb: list[str], out: Path) -> float:
    """Seconds of the conversion itself, as the verb says them."""
    hpt = str(Path(sys.executable).with_name("hpt"))
    done = subprocess.run(
        [*under, hpt, "convert", *verb, "--out", str(out)],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    found = re.search(r"GB in ([0-9.]+) s", done.stdout)
    assert found, done.stdout
    return float(found[1])


def measure(where: Path, gigabytes: float, repeats: int, processes: int) -> list[Direction]:
    to_megatron = Direction(str(where), processes, "to Megatron")
    to_hf = Direction(str(where), processes, "to HF")
    where.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=where) as name:
        folder = Path(name)
        hf, megatron, back = folder / "hf", folder / "megatron", folder / "back"
        make_model(hf, gigabytes)
        for _ in range(repeats):
            turn(to_megatron, hf, megatron, ["hf-to-megatron", "--hf", str(hf), *LAYOUT])
            turn(to_hf, megatron, back, ["megatron-to-hf", "--megatron", str(megatron)])
            subprocess.run(["diff", "-r", hf, back], check=True)
            for made in (megatron, back):
                shutil.rmtree(made)
    return [to_megatron, to_hf]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folders", type=Path, nargs="+", default=[Path("build"), Path("/dev/shm")])
    parser.add_argument("--out", type=Path, help="file whose table is replaced; without it: print")
    options = parser.parse_args()
    loads = [os.getloadavg()[0]]
    rows: list[Direction] = []
    for folder in options.folders:
        for processes in PROCESSES:
            rows += measure(folder, options.gb, options.repeats, processes)
            loads.append(os.getloadavg()[0])
    lines = [
        "| folder | processes | direction | cp, GB/s | conversion without fsync | of cp | cp and fsync | "
        "conversion | of cp and fsync |",
        "|---|---|---|---|---|---|---|---|---|",
        *(row.row() for row in rows),
        "",
        f"{rows[0].nbytes / 1e9:.2f} GB; median (least to most) of {options.repeats} turns; load average "
        f"{min(loads):.1f} to {max(loads):.1f}.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(TABLE.sub(lambda _: text, options.out.read_text()))


if __name__ == "__main__":
    main()
