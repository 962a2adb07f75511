"""Tokens a second of the loaders on one order: DALI, torch's DataLoader, and HF datasets as the peer.

    python bench/loader.py --out bench/results/loader.md

All give padded int32 batches of the same sequences in the same shuffled order, in one process. Also: batches
after 20 kills and resumptions, and two epochs at 1, 2 and 4 data-parallel ranks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from hpt_mega.data.order import Order  # noqa: E402
from hpt_mega.data.readers import TokenBatch, read_batches  # noqa: E402
from hpt_mega.data.store import PARTS, TokenFile  # noqa: E402
from hpt_mega.megatron.indexed import TokenWriter  # noqa: E402

VOCABULARY = 49_152
SEED = 3
KILLS = 20


def write(folder: Path, count: int, median: int) -> TokenFile:
    """Prompts of 20 to 200 tokens, responses around `median`, in the format that training reads."""
    draw = np.random.default_rng(0)
    with TokenWriter(folder / "tokens", VOCABULARY) as writer:
        for _ in range(count):
            lengths = int(draw.integers(20, 200)), int(min(8192, draw.lognormal(np.log(median), 0.6))), 0
            writer.add([draw.integers(0, VOCABULARY, length).astype(np.int32) for length in lengths])
        writer.finish()
    return TokenFile(folder / "tokens")


def plan(count: int, size: int, first: int = 0, epochs: int = 1) -> Iterator[list[int]]:
    """The batches of some epochs from batch `first` on."""
    order = Order([count], SEED)
    for batch in range(first, epochs * count // size):
        yield [order[batch * size + i] for i in range(size)]


def hugging_face(folder: Path, file: TokenFile, kind: str) -> Callable[[list[list[int]]], Iterator[Any]]:
    """A reader of the same sequences by `datasets` in the format `kind`, padded by a collate_fn."""
    from datasets import Dataset, load_from_disk

    path = folder / "hf"
    if not path.exists():
        rows = (file.span(PARTS * i, PARTS).astype(np.int32) for i in range(len(file) // PARTS))
        Dataset.from_dict({"input_ids": list(rows)}).save_to_disk(path)
    rows_of = load_from_disk(str(path)).with_format(kind)

    def pad(rows: list[dict[str, Any]]) -> torch.Tensor:
        if kind == "torch":
            tensors = [row["input_ids"].int() for row in rows]
            return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
        longest = max(len(row["input_ids"]) for row in rows)
        tokens = np.zeros((len(rows), longest), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row["input_ids"])] = row["input_ids"]
        return torch.from_numpy(tokens)

    return lambda batches: iter(DataLoader(rows_of, batch_sampler=batches, collate_fn=pad))


def seconds(batches: Iterator[Any], tokens_of: Callable[[Any], torch.Tensor]) -> tuple[float, int]:
    """(seconds, checksum) of reading all batches but the first, with which a pipeline is built."""
    checksum = int(tokens_of(next(batches))[:, :64].sum())
    started = time.perf_counter()
    for batch in batches:
        checksum += int(tokens_of(batch)[:, :64].sum())  # touches the batch, at the same cost for all
    return time.perf_counter() - started, checksum


def throughput(folder: Path, file: TokenFile, size: int, rounds: int) -> list[str]:
    batches = list(plan(len(file) // PARTS, size))
    total = sum(int(file.lengths.reshape(-1, PARTS)[batch].sum()) for batch in batches[1:])
    readers: dict[str, Callable[[], tuple[Iterator[Any], Callable[[Any], torch.Tensor]]]] = {
        "DALI pipeline": lambda: (read_batches(file, batches, "dali"), lambda b: b.tokens_BS),
        "torch DataLoader": lambda: (read_batches(file, batches, "torch"), lambda b: b.tokens_BS),
    }
    for kind in ("numpy", "torch", "python"):
        read = hugging_face(folder, file, None if kind == "python" else kind)
        readers[f"datasets, {kind} format"] = lambda read=read: (read(batches), lambda b: b)
    taken: dict[str, list[float]] = {name: [] for name in readers}
    checksums = set()
    for _ in range(rounds):  # in turn, so that a busy moment of the machine meets all alike
        for name, make in readers.items():
            spent, checksum = seconds(*make())
            taken[name].append(spent)
            checksums.add(checksum)
    assert len(checksums) == 1, "the readers do not give the same tokens"
    median = {name: float(np.median(times)) for name, times in taken.items()}
    peer = min(spent for name, spent in median.items() if name.startswith("datasets"))
    rows = [f"| {name} | {total / spent / 1e6:.1f} | {peer / spent:.1f} |" for name, spent in median.items()]
    head = [
        f"{len(batches) * size:,} sequences, {total / 1e6:.1f} M tokens, batches of {size}, median of "
        f"{rounds} rounds in turn, each after its first batch; the readers' tokens were equal.",
        "",
        "| reader | M tokens/s | times the fastest of datasets |",
        "|---|---:|---:|",
    ]
    return head + rows


def _serve(pipe: Connection, prefix: Path, reader: str, size: int, first: int) -> None:
    file = TokenFile(prefix)
    batches = plan(len(file) // PARTS, size, first)
    for batch in read_batches(file, batches, reader):
        pipe.send(_checksum(batch))


def _checksum(batch: TokenBatch) -> int:
    return zlib.crc32(batch.tokens_BS.numpy().tobytes())


def killed_and_resumed(prefix: Path, reader: str, size: int) -> int:
    """Batches checked: a process is killed at 20 random points, and another goes on after what came."""
    context = multiprocessing.get_context("fork")
    file = TokenFile(prefix)
    order = list(plan(len(file) // PARTS, size))
    draw = random.Random(7)
    expected = [_checksum(batch) for batch in read_batches(file, order, "torch")]
    received: list[int] = []
    stops = sorted(draw.sample(range(1, len(expected)), KILLS))
    for stop in [*stops, len(expected)]:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(there, prefix, reader, size, len(received)))
        process.start()
        there.close()
        while len(received) < stop:
            assert here.poll(60), f"no batch {len(received)} within 60 s"
            received.append(here.recv())
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        here.close()
    assert received == expected, "a resumed order differs"
    return len(received)


def two_epochs(count: int, size: int) -> list[int]:
    """The numbers of ranks at which two epochs were served without a repeat or a gap."""
    order = Order([count], SEED)
    held = []
    for ranks in (1, 2, 4):
        per_rank = size // ranks
        served: list[int] = []
        for batch in range(2 * count // size + 1):
            for rank in range(ranks):
                first = batch * size + rank * per_rank
                served += [order[first + i] for i in range(per_rank)]
        everything = set(range(count))
        if set(served[:count]) == set(served[count : 2 * count]) == everything:
            held.append(ranks)
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=50_000)
    parser.add_argument("--median", type=int, default=500, help="tokens of a response (500)")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write(folder, options.sequences, options.median)
        checked = {r: killed_and_resumed(folder / "tokens", r, options.batch) for r in ("torch", "dali")}
        lines = ["# Loaders", "", f"`python bench/loader.py`, {os.cpu_count()} cores, CPU only.", ""]
        lines += throughput(folder, file, options.batch, options.rounds)
    for reader, batches in checked.items():
        lines += ["", f"{reader}: {batches} batches the same after {KILLS} SIGKILLs and resumptions."]
    ranks = ", ".join(map(str, two_epochs(options.sequences, options.batch)))
    lines += ["", f"Two epochs without a repeat or a gap at {ranks} data-parallel ranks."]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
