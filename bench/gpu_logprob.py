"""Memory and time of token_logprobs on a GPU, beside log_softmax, cross_entropy and the bare products.

    PYTHONPATH=. python bench/gpu_logprob.py --out bench/results/gpu_logprob.md

Forward and backward of the mean log-probability of given tokens. Extra memory is the peak above the inputs,
less the two gradients that every path has to return. Needs an NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import _gpu
import torch
from torch import Tensor

from hpt_mega.objective.logprob import token_logprobs

TOKENS = 8192
SIZES = ((151936, 1024), (128256, 4096))  # vocabulary and width: Qwen3-0.6B, Llama-3.1-8B
GIB = 2**30
ROUNDS = 5


def seconds(work: Callable[[], object]) -> float:
    work()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / ROUNDS


def row(dtype: torch.dtype, vocabulary: int, width: int) -> str:
    hidden = torch.randn(TOKENS, width, device="cuda", dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device="cuda", dtype=dtype) * 0.02).requires_grad_()
    targets = torch.randint(0, vocabulary, (TOKENS,), device="cuda")

    def ours() -> None:
        token_logprobs(hidden, weight, targets)[0].mean().backward()

    def log_softmax() -> None:
        logp = torch.log_softmax((hidden @ weight.t()).float(), dim=-1)
        logp.gather(1, targets[:, None]).mean().backward()

    def cross_entropy() -> None:
        torch.nn.functional.cross_entropy((hidden @ weight.t()).float(), targets).backward()

    cells = [f"{products(hidden.detach(), weight.detach()) * 1e3:.1f}"]
    for path in (ours, log_softmax, cross_entropy):
        hidden.grad = weight.grad = None
        torch.cuda.empty_cache()
        path()
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        path()
        gradients = sum(x.numel() * x.element_size() for x in (hidden, weight))
        extra = (torch.cuda.max_memory_allocated() - before - gradients) / GIB
        cells.append(f"{seconds(path) * 1e3:.1f} ms, {extra:.2f} GiB")
    return f"| {str(dtype).removeprefix('torch.')} | {vocabulary:,} x {width:,} | {' | '.join(cells)} |"


def products(hidden: Tensor, weight: Tensor) -> float:
    """Seconds of the products: forward, and both of backward."""
    logits = torch.zeros(len(hidden), len(weight), device="cuda", dtype=hidden.dtype)
    steps: tuple[Callable[[], object], ...] = (
        lambda: torch.mm(hidden, weight.t(), out=logits),
        lambda: torch.mm(logits, weight),
        lambda: torch.mm(logits.t(), hidden),
    )
    return sum(map(seconds, steps))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    _gpu.require()
    lines = [
        "| dtype | vocabulary x width | three products, ms | ours | log_softmax | cross_entropy |",
        "|---|---|---|---|---|---|",
    ]
    for dtype in (torch.bfloat16, torch.float32):
        for vocabulary, width in SIZES:
            lines.append(row(dtype, vocabulary, width))
            print(lines[-1], flush=True)
    if options.out:
        made = f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {TOKENS:,} tokens."
        head = ["# Log-probabilities on a GPU", "", f"Made by bench/gpu_logprob.py on one {made}", ""]
        options.out.write_text("\n".join([*head, *lines, ""]))


if __name__ == "__main__":
    main()
