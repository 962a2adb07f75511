"""Training speed and memory on one GPU, beside transformers and beside what `hpt plan` says.

    PYTHONPATH=. python bench/gpu_speed.py --out bench/results/gpu_speed.md

Random weights in the shapes of Llama 3; packed sequences of 4,096 tokens; a step is forward, backward,
clipping and AdamW. transformers has bf16 weights and moments (no fp32 copies), SDPA attention and torch's
fused AdamW. Each row is a fresh process. Needs an NVIDIA GPU and Transformer Engine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import _gpu
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hpt_mega.config import ParallelConfig, compose
from hpt_mega.launch import single_rank_environment
from hpt_mega.planning.hardware import HARDWARE, hardware
from hpt_mega.planning.job import Job, Layout
from hpt_mega.planning.models import ModelShape
from hpt_mega.planning.search import plan
from hpt_mega.trajectory import Source, Trajectory
from hpt_mega.worker import build_learner
from tests.megatron.tiny import build_policy

GIB = 2**30
VOCABULARY, LENGTH, TOGETHER = 128256, 4096, 2  # tokens of a sequence, sequences of a micro-batch


def llama(hidden: int, layers: int, ffn: int, *, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=ffn,
        max_position_embeddings=8192,
        tie_word_embeddings=tied,
    )


SHAPES = {
    "Llama 3.2 1B": llama(2048, 16, 8192, tied=True),
    "Llama 3.1 8B, 8 of its 32 layers": llama(4096, 8, 14336, tied=False),
}
WAYS = ("transformers", "bf16", "fp8_delayed", "fp8_tensorwise", "fp8_blockwise")


def sequences(count: int, step: int) -> list[Trajectory]:
    """With a prompt of one token, so that all others are trained on."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator).tolist()
    return [Trajectory(tuple(r[:1]), tuple(r[1:]), i, Source.OFFLINE, 0) for i, r in enumerate(tokens)]


def ours(folder: Path, precision: str) -> Callable[[list[Trajectory]], None]:
    base = compose(["algorithm=sft", f"precision={precision}"])
    trainer = replace(base.trainer, tokens_per_microbatch=TOGETHER * LENGTH)
    cfg = replace(base, parallel=ParallelConfig(1, 1, 1), trainer=trainer)
    policy = build_policy(folder, cfg, train=False)
    learner = build_learner(cfg, policy.layout, policy.model, policy.shape)

    def step(batch: list[Trajectory]) -> None:
        learner.learn(batch, 0)

    return step


def transformers(folder: Path) -> Callable[[list[Trajectory]], None]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0, fused=True)

    def step(batch: list[Trajectory]) -> None:
        rows = torch.tensor([t.prompt_tokens + t.response_tokens for t in batch]).cuda()
        optimizer.zero_grad()
        for tokens_BS in rows.split(TOGETHER):
            logits_NV = model(tokens_BS).logits[:, :-1].flatten(0, 1).float()
            nll = torch.nn.functional.cross_entropy(logits_NV, tokens_BS[:, 1:].flatten(), reduction="sum")
            (nll / rows[:, 1:].numel()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def measure(name: str, way: str, options: argparse.Namespace) -> dict[str, float]:
    """In this process: seconds a step (median) and peak GiB."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        with torch.device("cuda"):
            LlamaForCausalLM(SHAPES[name]).to(torch.bfloat16).save_pretrained(scratch)
        torch.cuda.empty_cache()
        folder = Path(scratch)
        step = transformers(folder) if way == "transformers" else ours(folder, way)
    seconds = []
    for number in range(options.steps + 2):
        batch = sequences(options.sequences, number)
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step(batch)
        torch.cuda.synchronize()
        if number > 1:  # the first two are warm-up
            seconds.append(time.perf_counter() - begun)
        elif number == 0:
            torch.cuda.reset_peak_memory_stats()
    return {"seconds": statistics.median(seconds), "gib": torch.cuda.max_memory_allocated() / GIB}


def predicted(name: str, way: str, options: argparse.Namespace) -> Any:
    config = SHAPES[name]
    shape = ModelShape(
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.intermediate_size,
        VOCABULARY,
        kv_heads=config.num_key_value_heads,
        tied=config.tie_word_embeddings,
    )
    job = Job(gpus=1, batch=options.sequences, seq=LENGTH, precision="fp8" if "fp8" in way else "bf16")
    return plan(shape, job, Layout(microbatch=TOGETHER), gpu())


def gpu() -> Any:
    """The data sheet of this GPU; the nearest one where there is none."""
    name = torch.cuda.get_device_name().lower()
    return hardware(next((known for known in HARDWARE if known in name), "h100"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--sequences", type=int, default=8, help="of a step")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ |= single_rank_environment()
    _gpu.require()
    if options.one:
        print(json.dumps(measure(*options.one, options)))
        return
    lines = [
        "| shape | precision | tokens/s | beside transformers | hpt plan says | peak GiB | hpt plan says |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    tokens = options.sequences * LENGTH
    for name in SHAPES:
        peer: float | None = None
        for way in options.ways:
            fixed = ["--steps", str(options.steps), "--sequences", str(options.sequences)]
            command = [sys.executable, __file__, "--one", name, way, *fixed]
            ran = subprocess.run(command, capture_output=True, text=True)
            if ran.returncode:
                print(ran.stderr[-3000:], file=sys.stderr)
                lines.append(
                    f"| {name} | {way} | failed: {ran.stderr.strip().splitlines()[-1][:90]} | | | | |"
                )
            else:
                found = json.loads(ran.stdout.splitlines()[-1])
                cells = described(name, way, found, peer, tokens, options)
                lines.append(f"| {name} | {way} | {cells} |")
                peer = found["seconds"] if way == "transformers" else peer
            print(lines[-1], flush=True)
    if options.out:
        options.out.write_text(report(lines, options))


def described(
    name: str,
    way: str,
    found: dict[str, float],
    peer: float | None,
    tokens: int,
    options: argparse.Namespace,
) -> str:
    speed = tokens / found["seconds"]
    beside = f"{peer / found['seconds']:.2f}x" if peer else ""
    if way == "transformers":
        return f"{speed:,.0f} | | | {found['gib']:.1f} | "
    said = predicted(name, way, options)
    rate = said.tokens_per_s_per_gpu
    return (
        f"{speed:,.0f} | {beside} | {rate:,.0f} ({rate / speed - 1:+.0%}) | {found['gib']:.1f} | "
        f"{said.memory_gib:.1f} ({said.memory_gib / found['gib'] - 1:+.0%})"
    )


def report(lines: list[str], options: argparse.Namespace) -> str:
    return "\n".join(
        [
            "# Training on one GPU",
            "",
            f"{_gpu.made_by('gpu_speed')} A step is {options.sequences} sequences of {LENGTH:,} tokens, "
            f"{TOGETHER} a micro-batch; median of {options.steps} steps. Ours has fp32 master weights, "
            "gradients and moments; FP8 is in the linear layers.",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
