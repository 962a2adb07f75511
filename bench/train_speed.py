"""Training speed beside transformers: the same weights, trajectories, budget and dtype, turn by turn.

    python bench/train_speed.py --out bench/results/train_speed.md

One process with all cores each. A step is forward, backward, clipping and AdamW over the demo's questions
with their demonstrations, packed here and right-padded for transformers, which computes the mean negative
log-likelihood of the same tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from packing import padded_plan
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpt_mega.config import Config, compose
from hpt_mega.data.balancing import plan_microbatches
from hpt_mega.data.packing import MicroBatch, collate
from hpt_mega.data.questions import load_questions
from hpt_mega.launch import single_rank_environment
from hpt_mega.megatron import runtime
from hpt_mega.megatron.model import DTYPES
from hpt_mega.megatron.step import Objective, forward_backward, update
from hpt_mega.objective import algorithm
from hpt_mega.scheduler.blend import demonstration
from tests.megatron.tiny import build_policy

Step = Callable[[list[MicroBatch]], None]


def megatron_step(cfg: Config) -> Step:
    policy = build_policy(Path(cfg.model.path), cfg)

    def step(microbatches: list[MicroBatch]) -> None:
        tokens = sum(len(microbatch.targets_N) for microbatch in microbatches)
        policy.wrapped.zero_grad_buffer()
        policy.optimizer.zero_grad()
        objective = Objective(algorithm("sft"), float(tokens), 1.0, policy.shape.vocab_size)
        forward_backward(policy.wrapped, microbatches, objective, policy.layout)
        update(policy.optimizer)

    return step


def transformers_step(cfg: Config) -> Step:
    dtype = DTYPES[cfg.precision.dtype]
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path, dtype=dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.optimizer.lr, weight_decay=0.0)

    def step(microbatches: list[MicroBatch]) -> None:
        tokens = sum(len(microbatch.targets_N) for microbatch in microbatches)
        optimizer.zero_grad()
        for microbatch in microbatches:
            tokens_BS = microbatch.tokens_1S.view(-1, microbatch.longest)
            logits_BSV = model(tokens_BS).logits  # right-padded: causal attention needs no mask
            logits_NV = logits_BSV.flatten(0, 1)[microbatch.places_N].float()
            nll = torch.nn.functional.cross_entropy(logits_NV, microbatch.targets_N, reduction="sum")
            (nll / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def batches(cfg: Config, sequences: int) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """The sequences packed, and right-padded to the longest of each micro-batch, within the same budget."""
    questions = load_questions(cfg.data, AutoTokenizer.from_pretrained(cfg.model.path)).train[:sequences]
    trajectories = [demonstration(question, index, 0) for index, question in enumerate(questions)]
    sizes, budget = [len(t) for t in trajectories], cfg.trainer.tokens_per_microbatch
    packed = [
        collate([trajectories[i] for i in part], [1.0] * len(part))
        for part in plan_microbatches(sizes, budget)[0]
    ]
    padded = [
        collate([trajectories[i] for i in part], [1.0] * len(part), segment_multiple=sizes[part[0]])
        for part in padded_plan(sizes, budget)
    ]
    return packed, padded


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ |= single_rank_environment()
    lines = [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {options.sequences} sequences "
        f"a step, median of {options.rounds} rounds, turn by turn",
        "",
        "| dtype | ours, tokens/s | transformers, tokens/s | ratio (median; lowest, highest of a round) |",
        "|---|---|---|---|",
    ]
    for dtype in ("bf16", "fp32"):
        cfg = compose(["experiment=demo", "parallel=single", f"precision={dtype}"])
        ours, theirs = megatron_step(cfg), transformers_step(cfg)
        packed, padded = batches(cfg, options.sequences)
        tokens = sum(microbatch.tokens_1S.numel() for microbatch in packed)  # none of them padding
        seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
        for round_ in range(options.rounds + 1):
            for name, step, microbatches in (("ours", ours, packed), ("theirs", theirs, padded)):
                begun = time.perf_counter()
                step(microbatches)
                if round_:  # the first is warm-up
                    seconds[name].append(time.perf_counter() - begun)
        runtime.shutdown()
        ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
        mine, peer = (tokens / statistics.median(seconds[name]) for name in ("ours", "theirs"))
        lines.append(
            f"| {dtype} | {mine:,.0f} | {peer:,.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}, {max(ratios):.2f}) |"
        )
        print("\n".join(lines[-1:]), flush=True)
    if options.out:
        options.out.write_text("# Training step beside transformers\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
