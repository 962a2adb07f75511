"""Memory and time of token_logprobs beside log_softmax, cross_entropy and the bare matrix products.

    python bench/logprob.py --out bench/results/logprob.md        # 8,192 tokens x 151,936 x 1,024

Forward and backward of the mean log-probability of given tokens, each path in fresh processes. Extra memory
is the peak of the resident set (VmHWM) above the inputs, less the two gradients every path has to return.
Paths take turns; the smallest time of the turns counts, in wall seconds and in seconds of the processor,
which other processes of the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.objective.logprob import token_logprobs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
GIB = 2**30
Result = dict[str, float]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, shard: int = 0) -> None:
    group = dist.group.WORLD if dist.is_initialized() else None
    logp, _ = token_logprobs(hidden, weight, targets, group=group, vocab_start=shard)
    logp.mean().backward()


def ours_with_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, shard: int = 0) -> None:
    group = dist.group.WORLD if dist.is_initialized() else None
    logp, entropy = token_logprobs(hidden, weight, targets, group=group, vocab_start=shard)
    (logp.mean() + 0.01 * entropy.mean()).backward()


def log_softmax(hidden: Tensor, weight: Tensor, targets: Tensor, shard: int = 0) -> None:
    logits = (hidden @ weight.t()).float()
    logp = torch.log_softmax(logits, dim=-1)
    del logits
    logp.gather(1, targets[:, None]).mean().backward()


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, shard: int = 0) -> None:
    torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets).backward()


PATHS: dict[str, Callable[..., None]] = {
    "ours": ours,
    "ours_with_entropy": ours_with_entropy,
    "log_softmax": log_softmax,
    "cross_entropy": cross_entropy,
}


def products(hidden: Tensor, weight: Tensor) -> Result:
    """Seconds of the products: forward, both of backward; and with the forward once more."""
    hidden, weight = hidden.detach(), weight.detach()
    logits = hidden.new_zeros(hidden.shape[0], weight.shape[0])
    steps: list[Callable[[], object]] = [
        lambda: torch.mm(hidden, weight.t(), out=logits),
        lambda: torch.mm(logits, weight, out=torch.zeros_like(hidden)),
        lambda: torch.mm(logits.t(), hidden, out=torch.zeros_like(weight)),
    ]
    timed = [clocked(step) for step in steps]
    three = {key: sum(result[key] for result in timed) for key in timed[0]}
    return three | {f"four_{key}": three[key] + timed[0][key] for key in three}


def clocked(work: Callable[[], object]) -> Result:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def peak_memory() -> tuple[int, int]:
    """(resident now, highest since the last reset), in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return int(fields["VmRSS"]) * 1024, int(fields["VmHWM"]) * 1024


def child(options: argparse.Namespace) -> None:
    """Run one path once, as one of `ranks` processes, and print its figures as JSON."""
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, this process goes first
    torch.set_num_threads(max(1, options.threads // options.ranks))
    if options.ranks > 1:
        dist.init_process_group("gloo", rank=options.rank, world_size=options.ranks)
    dtype, rows = DTYPES[options.dtype], options.vocab // options.ranks
    generator = torch.Generator().manual_seed(0)
    hidden = torch.empty(options.tokens, options.hidden, dtype=dtype).normal_(generator=generator)
    weight = torch.empty(rows, options.hidden, dtype=dtype).normal_(std=0.02, generator=generator)
    targets = torch.randint(0, options.vocab, (options.tokens,), generator=generator)
    hidden.requires_grad_()
    weight.requires_grad_()
    for warm in PATHS.values() if options.ranks == 1 else [ours]:  # libraries load before memory is taken
        warm(hidden[:2], weight[:8], targets[:2] % 8)
    hidden.grad = weight.grad = None
    if dist.is_initialized():
        dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, _ = peak_memory()
    if options.path == "products":
        found = products(hidden, weight)
    else:
        found = clocked(lambda: PATHS[options.path](hidden, weight, targets, options.rank * rows))
    gradients = sum(x.numel() * x.element_size() for x in (hidden, weight))
    found["memory"] = (peak_memory()[1] - before - gradients) / GIB
    print(json.dumps(found))


def measure(path: str, dtype: str, ranks: int, options: argparse.Namespace) -> Result:
    """The figures of one path in fresh processes; of several ranks the largest of each figure."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, __file__, "--path", path, "--dtype", dtype, "--ranks", str(ranks),
        "--tokens", str(options.tokens), "--vocab", str(options.vocab), "--hidden", str(options.hidden),
        "--threads", str(options.threads),
    ]  # fmt: skip
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen([*command, "--rank", str(rank)], env=environment, stdout=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=options.deadline)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    if any(process.returncode for process in started):
        raise RuntimeError(f"{path} {dtype} on {ranks} ranks failed; see its message above")
    results = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {key: max(result[key] for result in results) for key in results[0]}


def wait_for_memory(path: str, options: argparse.Namespace) -> None:
    """Return once the machine has room for a path's [tokens, vocabulary] copies in fp32, and some more.

    Raises TimeoutError after the deadline.
    """
    copies = 0.4 if path.startswith("ours") else 1.2 if path == "products" else 3.2
    needed = copies * options.tokens * options.vocab * 4 + 2 * GIB
    until = time.monotonic() + options.deadline
    while psutil.virtual_memory().available < needed:
        if time.monotonic() > until:
            raise TimeoutError(f"{path} needs {needed / GIB:.1f} GiB of free memory; lower --tokens")
        time.sleep(1)


def run(dtype: str, ranks: int, options: argparse.Namespace) -> dict[str, Result]:
    """Figures of each path: the smallest times and the largest memory of the turns."""
    alone = ("log_softmax", "cross_entropy")  # they do not know of a shared vocabulary
    names = [name for name in options.paths if ranks == 1 or name not in alone]
    best: dict[str, Result] = {}
    for turn in range(options.turns):
        for name in names:
            wait_for_memory(name, options)
            found = measure(name, dtype, ranks, options)
            print(f"turn {turn + 1} {dtype} tp{ranks} {name}: {found}", file=sys.stderr, flush=True)
            past = best.setdefault(name, found)
            best[name] = {key: (max if key == "memory" else min)(past[key], found[key]) for key in found}
    return best


def table(results: dict[str, Result], title: str) -> list[str]:
    base = results["products"]
    plain = results.get("log_softmax", {}).get("memory")
    lines = [
        f"## {title}",
        "",
        "| path | extra memory, GiB | plain / this | wall s | ÷ 3 products | ÷ 4 | processor s | ÷ 3 | ÷ 4 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        if name != "products":
            less = f"{plain / found['memory']:.1f}" if plain else ""
            cells = [
                name,
                f"{found['memory']:.2f}",
                less,
                *_times(found, base, "wall"),
                *_times(found, base, "cpu"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    for name, key in (("3 products: forward, two backward", ""), ("4: and the recomputation", "four_")):
        wall, cpu = base[f"{key}wall"], base[f"{key}cpu"]
        lines.append(f"| {name} | | | {wall:.1f} | | | {cpu:.1f} | | |")
    return [*lines, ""]


def _times(found: Result, base: Result, clock: str) -> list[str]:
    seconds = found[clock]
    ratios = (seconds / base[clock], seconds / base[f"four_{clock}"])
    return [f"{seconds:.1f}", *(f"{ratio:.2f}" for ratio in ratios)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of all ranks together")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    every = ["products", *PATHS]
    parser.add_argument("--paths", nargs="+", default=every, choices=every, help="products among them")
    parser.add_argument("--tp", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--deadline", type=float, default=1800.0, help="seconds a path may take")
    parser.add_argument("--out", type=Path)
    for name, kind in (("--path", str), ("--dtype", str), ("--rank", int), ("--ranks", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.path:
        child(options)
        return
    size = f"{options.tokens:,} tokens x {options.vocab:,} vocabulary x {options.hidden:,} hidden"
    lines = [
        "# token_logprobs: memory and time",
        "",
        f"{size}, forward and backward, {options.threads} threads, the best of {options.turns} turns, "
        f"torch {torch.__version__}. Written by `python bench/logprob.py`.",
        "Other work ran on the machine: load average "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} processors at the start.",
        "",
    ]
    for ranks in options.tp:
        for dtype in options.dtypes:
            where = f"{dtype}, " + ("one process" if ranks == 1 else f"TP{ranks}, each rank with its shard")
            lines += table(run(dtype, ranks, options), where)
            text = "\n".join(lines)
            if options.out:
                options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
