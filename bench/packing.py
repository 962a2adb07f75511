"""Packing: padding, balance and speed of the planner, and step time beside padded micro-batches.

    python bench/packing.py --out bench/results/packing.md

The padded path is what packing replaced: sequences of like length share a right-padded [B, S] batch whose
size in tokens stays within the same budget. Model, objective, optimizer and sequences are the same.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from hpt_mega.checkpoint.hf import HFCheckpoint
from hpt_mega.config import Config, compose
from hpt_mega.data.balancing import plan_microbatches
from hpt_mega.data.packing import MicroBatch, collate
from hpt_mega.data.questions import load_questions
from hpt_mega.launch import single_rank_environment
from hpt_mega.megatron import runtime
from hpt_mega.megatron.model import DTYPES, build_model
from hpt_mega.megatron.optimizer import build_optimizer, wrap_data_parallel
from hpt_mega.megatron.step import Objective, forward_backward, update
from hpt_mega.objective import algorithm
from hpt_mega.resharding.mapping import family_for
from hpt_mega.scheduler.blend import demonstration
from hpt_mega.trajectory import Source, Trajectory

SEQUENCES = 46_000  # the size of OpenR1-Math-46k
BUDGET = 16_384
SHARE = 3.3e-5  # attention beside the matrices, a token of length: Qwen2.5-7B's (3,584 wide, 28 layers)


def lengths(count: int) -> list[int]:
    """Lognormal lengths between 50 and 8,192."""
    drawn = np.random.default_rng(0).lognormal(np.log(1200), 0.9, count)
    return np.clip(drawn, 50, 8192).astype(int).tolist()


def padded_plan(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Longest first; a micro-batch is as wide as its longest sequence."""
    plan: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if plan and sizes[plan[-1][0]] * (len(plan[-1]) + 1) <= budget:
            plan[-1].append(index)
        else:
            plan.append([index])
    return plan


def balance_table() -> list[str]:
    lines = [
        "| sequences | ranks | planner, CPU s | padding | full to | work, heaviest rank over mean "
        "| work, waiting at every micro-batch | padding of padded micro-batches |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count, ranks in ((SEQUENCES, 8), (SEQUENCES, 64), (1024, 8), (1024, 2)):
        sizes = lengths(count)
        begun = time.process_time()  # of this process: the machine may be shared
        plan = plan_microbatches(sizes, BUDGET, ranks, quadratic=SHARE)
        seconds = time.process_time() - begun
        work = np.array(
            [[sum(sizes[i] * (1 + SHARE * sizes[i]) for i in part) for part in rank] for rank in plan]
        )
        tokens = sum(sizes)
        batches = [collate([_blank(sizes[i]) for i in part]) for rank in plan[:1] for part in rank[:50]]
        row = sum(batch.tokens_1S.numel() for batch in batches)
        real = sum(sum(sizes[i] for i in part) for part in plan[0][:50])
        wide = sum(sizes[part[0]] * len(part) for part in padded_plan(sizes, BUDGET))
        lines.append(
            f"| {count:,} | {ranks} | {seconds:.2f} | {1 - real / row:.2%} | "
            f"{tokens / (work.size * BUDGET):.1%} | {work.sum(1).max() / work.sum(1).mean() - 1:.2%} | "
            f"{work.max(0).sum() / work.mean(0).sum() - 1:.2%} | {1 - tokens / wide:.2%} |"
        )
    return lines


def _blank(length: int) -> Trajectory:
    return Trajectory((1,), (1,) * (length - 1), 0, Source.OFFLINE, 0)


@dataclass
class Bench:
    """One model that takes steps on packed and on padded micro-batches."""

    layout: Any
    wrapped: Any
    optimizer: Any
    vocab_size: int

    def step(self, microbatches: Sequence[MicroBatch], run: Callable[..., Any]) -> None:
        self.gradient(microbatches, run)
        update(self.optimizer)

    def gradient(self, microbatches: Sequence[MicroBatch], run: Callable[..., Any]) -> Iterator[torch.Tensor]:
        """Each parameter's, of the mean over tokens."""
        tokens = sum(len(microbatch.targets_N) for microbatch in microbatches)
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        run(microbatches, Objective(algorithm("sft"), float(tokens), 1.0, self.vocab_size))
        return (parameter.main_grad for parameter in self.wrapped.parameters())

    def packed(self, microbatches: Sequence[MicroBatch], objective: Objective) -> None:
        forward_backward(self.wrapped, microbatches, objective, self.layout)

    def padded(self, microbatches: Sequence[MicroBatch], objective: Objective) -> None:
        """Segments of one length are the rows of a right-padded batch."""
        for microbatch in microbatches:
            tokens_BS = microbatch.tokens_1S.view(-1, microbatch.longest)
            positions_1S = torch.arange(microbatch.longest)[None]
            hidden_SBH = self.wrapped(tokens_BS, positions_1S, None)
            row = hidden_SBH.transpose(0, 1).reshape(-1, 1, hidden_SBH.shape[-1])
            objective(microbatch, self.wrapped.module, row, self.layout)[0].backward()
        self.wrapped.module.config.finalize_model_grads_func([self.wrapped])


def build(cfg: Config, layers: int) -> Bench:
    """The demo's model, of as many layers; what its weights are does not change the time of a step."""
    layout = runtime.initialize(cfg)
    config = HFCheckpoint(Path(cfg.model.path)).config
    shape = replace(family_for(config).read_shape(config), num_layers=layers)
    model = build_model(shape, cfg.parallel, layout, DTYPES[cfg.precision.dtype])
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    wrapped = wrap_data_parallel(model, cfg)
    return Bench(layout, wrapped, build_optimizer(wrapped, cfg), shape.vocab_size)


def demo_trajectories(cfg: Config, sequences: int) -> list[Trajectory]:
    questions = load_questions(cfg.data, AutoTokenizer.from_pretrained(cfg.model.path)).train[:sequences]
    return [demonstration(question, index, 0) for index, question in enumerate(questions)]


def step_table(rounds: int, sequences: int, layers: int) -> list[str]:
    lines = [
        "| dtype | packed, CPU s | padded, CPU s | padded / packed (median; lowest, highest of a round) "
        "| padding of packed | of padded | gradient: largest difference, of the largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype in ("bf16", "fp32"):
        cfg = compose(["experiment=demo", "parallel=single", f"precision={dtype}"])
        bench, items = build(cfg, layers), demo_trajectories(cfg, sequences)
        sizes, budget = [len(t) for t in items], cfg.trainer.tokens_per_microbatch
        share = bench.wrapped.module.attention_share()
        packed = [
            collate([items[i] for i in part], [1.0] * len(part))
            for part in plan_microbatches(sizes, budget, quadratic=share)[0]
        ]
        padded = [
            collate([items[i] for i in part], [1.0] * len(part), segment_multiple=sizes[part[0]])
            for part in padded_plan(sizes, budget)
        ]
        kept = [gradient.clone() for gradient in bench.gradient(packed, bench.packed)]
        moved = max(
            float((new - old).abs().max())
            for old, new in zip(kept, bench.gradient(padded, bench.padded), strict=True)
        )
        largest = max(float(gradient.abs().max()) for gradient in kept)
        seconds: dict[str, list[float]] = {"packed": [], "padded": []}
        for round_ in range(rounds + 1):
            for name, batches, run in (
                ("packed", packed, bench.packed),
                ("padded", padded, bench.padded),
            ):
                begun = time.process_time()
                bench.step(batches, run)
                if round_:  # the first is warm-up
                    seconds[name].append(time.process_time() - begun)
        runtime.shutdown()
        ratios = [b / a for a, b in zip(seconds["packed"], seconds["padded"], strict=True)]
        waste = [1 - sum(sizes) / sum(b.tokens_1S.numel() for b in batches) for batches in (packed, padded)]
        lines.append(
            f"| {dtype} | {statistics.median(seconds['packed']):.2f} | "
            f"{statistics.median(seconds['padded']):.2f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}, {max(ratios):.2f}) | {waste[0]:.1%} | {waste[1]:.1%} "
            f"| {moved:.1e} of {largest:.1e} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ |= single_rank_environment()
    torch.set_num_threads(1)  # CPU seconds of one thread say the same on a busy machine
    lines = [
        "# Packing",
        "",
        f"Lengths are lognormal (median 1,200, sigma 0.9) cut to 50-8,192; budget {BUDGET:,} tokens.",
        "",
        *balance_table(),
    ]
    print("\n".join(lines), flush=True)
    lines += [
        "",
        f"A step of the demo's model ({options.layers} of its 30 layers) on {options.sequences} "
        f"demonstrations, budget 1,024 tokens, torch {torch.__version__}, one thread, "
        f"median of {options.rounds} rounds:",
        "",
        *step_table(options.rounds, options.sequences, options.layers),
    ]
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
