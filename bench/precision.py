"""FP8 recipes on the CPU emulation: error of matrix products, and 200 steps of training beside bf16.

    PYTHONPATH=. python bench/precision.py --out bench/results/precision.md

One process, one thread. The task is next-token prediction on a synthetic language whose entropy is known; all
runs start from the same weights and see the same batches. The last rows scale wrongly on purpose.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests.megatron

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hpt_mega.config import Config, Fp8Config, OptimizerConfig, ParallelConfig, PrecisionConfig, compose
from hpt_mega.launch import single_rank_environment
from hpt_mega.megatron import runtime
from hpt_mega.megatron.fp8 import Operand, Role, Scaling, amax_of, product, scale_for
from hpt_mega.megatron.learner import Learner
from hpt_mega.megatron.precision import AmaxHistory
from hpt_mega.resharding.mapping import Family, ModelShape
from hpt_mega.trajectory import Source, Trajectory
from hpt_mega.worker import build_learner
from tests.megatron.test_fp8 import reference
from tests.megatron.tiny import build_policy

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
BLOCKS = {"blockwise": ((1, 128), (128, 128)), "mxfp8": ((1, 32), (1, 32))}
VOCABULARY, CONTEXTS, SUCCESSORS = 128, 4, (0.55, 0.25, 0.15, 0.05)
ENTROPY = -sum(p * math.log(p) for p in SUCCESSORS)


def product_errors() -> list[str]:
    """Rows of a table: distance to the fp64 product of the reference's operands, and to the exact product."""
    lines = [
        "| recipe | data | to the reference in fp64 | to the exact product | part of ordinary channels |",
        "|---|---|---|---|---|",
    ]
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(192, 512, generator=generator)
    outliers = normal.clone()
    outliers[:, ::97] *= 1e5  # a few channels far above the others, as trained models' activations have
    weight = 0.02 * torch.randn(320, 512, generator=generator)
    for recipe in RECIPES:
        for name, x in (("normal", normal), ("normal, outlying channels", outliers)):
            ours = product(
                operand(recipe, x, "input"),
                Operand((w := operand(recipe, weight, "weight")).values.t(), w.scale),
            ).double()
            blocks = BLOCKS.get(recipe, (None, None))
            expected = (
                reference(x, recipe, "e4m3", blocks[0]) @ reference(weight, recipe, "e4m3", blocks[1]).t()
            )
            exact = x.double() @ weight.double().t()
            ordinary = [c for c in range(512) if c % 97]
            part = x[:, ordinary].double() @ weight[:, ordinary].double().t()
            lines.append(
                f"| {recipe} | {name} | {distance(ours, expected):.1e} | {distance(ours, exact):.2%} | "
                f"{distance(part_of_product(recipe, x, weight, ordinary), part):.2%} |"
            )
    return lines


def operand(recipe: str, x: Tensor, role: Role) -> Operand:
    scaling = Scaling(recipe, "e4m3")
    scale = float(scale_for(amax_of(x), torch.float8_e4m3fn)) if recipe == "delayed" else None
    return scaling.quantise(x, role, 1, scale)


def part_of_product(recipe: str, x: Tensor, weight: Tensor, channels: list[int]) -> Tensor:
    """The part that some channels add to the product, as quantised among all of them."""
    a, b = operand(recipe, x, "input"), operand(recipe, weight, "weight")
    return (a.values[:, channels].double() @ b.values[:, channels].double().t()) * a.scale * b.scale


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


class Language:
    """Tokens of which each has four successors, by the token before and by a class of the one before that."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)
        self.table = torch.randint(
            0, VOCABULARY, (CONTEXTS, VOCABULARY, len(SUCCESSORS)), generator=generator
        )

    def batch(self, step: int, count: int = 12, length: int = 38) -> list[Trajectory]:
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = torch.randint(0, VOCABULARY, (count, 2), generator=generator)
        chosen = torch.multinomial(
            torch.tensor(SUCCESSORS), count * length, replacement=True, generator=generator
        )
        for draw in chosen.view(length, count):
            successors = self.table[tokens[:, -2] % CONTEXTS, tokens[:, -1]]
            tokens = torch.cat((tokens, successors.gather(1, draw[:, None])), dim=1)
        rows = tokens.tolist()
        return [Trajectory(tuple(r[:2]), tuple(r[2:]), i, Source.OFFLINE, 0) for i, r in enumerate(rows)]


def save_llama(folder: Path) -> Path:
    torch.manual_seed(3)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            intermediate_size=512,
            max_position_embeddings=64,
            initializer_range=0.05,
            dtype="float32",
        )
    ).save_pretrained(folder)
    return folder


def learner_of(
    folder: Path, fp8: Fp8Config, steps: int, dtype: str = "bf16"
) -> tuple[Learner, Family, ModelShape]:
    base = compose(["algorithm=sft"])
    cfg: Config = replace(
        base,
        parallel=ParallelConfig(1, 1, 1),
        precision=PrecisionConfig(dtype, fp8=fp8),
        optimizer=OptimizerConfig(lr=5e-3, warmup_steps=10, min_lr_ratio=0.1),
        trainer=replace(base.trainer, steps=steps, tokens_per_microbatch=1920),
    )
    os.environ |= single_rank_environment()
    policy = build_policy(folder, cfg, train=False)
    return build_learner(cfg, policy.layout, policy.model, policy.shape), policy.family, policy.shape


def heldout_loss(learner: Learner, language: Language) -> float:
    """Mean negative log-likelihood of tokens that no run trains on."""
    unseen = language.batch(-1, count=100)
    found = learner._per_token(unseen, learner._logp_under(learner.policy.module))
    return -sum(map(sum, found)) / sum(map(len, found))


def train(folder: Path, language: Language, fp8: Fp8Config, steps: int) -> tuple[float, float, float]:
    """Loss half-way and at the end, and seconds."""
    learner, _, _ = learner_of(folder, fp8, steps)
    begun, middle = time.perf_counter(), math.nan
    try:
        for step in range(steps):
            if step == steps // 2:
                middle = heldout_loss(learner, language)
            learner.learn(language.batch(step), step)
        return middle, heldout_loss(learner, language), time.perf_counter() - begun
    except FloatingPointError:
        return middle, math.nan, time.perf_counter() - begun
    finally:
        runtime.shutdown()


def stale_by(delay: int) -> Callable[..., None]:
    """AmaxHistory's update with scales from the amax of `delay` micro-batches ago, or the first one."""
    seen: dict[tuple[int, str], list[Tensor]] = {}

    def advance(self: AmaxHistory, role: Role, current: Tensor) -> None:
        past = seen.setdefault((id(self), role), [])
        past.append(current.clone())
        self.history[role][0] = 0.0
        old = past[max(0, len(past) - 1 - delay)]
        found = scale_for(old, self.scaling.dtype(role), self.fp8.margin)
        self.scale[role].copy_(torch.where(old > 0, found, self.scale[role]))

    return advance


@dataclass(frozen=True)
class Run:
    """One training run of the table; `delay`: how old delayed scaling's scales are made, in micro-batches."""

    name: str
    fp8: Fp8Config
    delay: int | None = None


FOR_EVER = 10**9


def planned() -> list[Run]:
    recipes = {name: compose([f"precision=fp8_{name}"]).precision.fp8 for name in RECIPES}
    return [
        Run("bf16", Fp8Config()),
        *(Run(f"fp8 {name}", fp8) for name, fp8 in recipes.items()),
        Run("wrong on purpose: fp8 delayed, scales of 100 steps ago", recipes["delayed"], 100),
        Run("wrong on purpose: fp8 delayed, scales 1 for ever", recipes["delayed"], FOR_EVER),
    ]


def result(run: Run, steps: int) -> tuple[float, float, float]:
    """Loss half-way and at the end, and seconds."""
    original: Any = AmaxHistory._advance
    if run.delay is not None:
        wrong = _never if run.delay == FOR_EVER else stale_by(run.delay)
        AmaxHistory._advance = wrong  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            return train(save_llama(Path(scratch) / "llama"), Language(), run.fp8, steps)
    finally:
        AmaxHistory._advance = original  # type: ignore[method-assign]


def table(results: dict[str, tuple[float, float, float]], steps: int) -> list[str]:
    lines = [
        f"| run | loss after {steps // 2} steps | after {steps} | beside bf16 | seconds |",
        "|---|---|---|---|---|",
    ]
    for name, (middle, final, seconds) in results.items():
        beside = f"{final / results['bf16'][1] - 1:+.2%}" if math.isfinite(final) else "not finite"
        lines.append(f"| {name} | {middle:.4f} | {final:.4f} | {beside} | {seconds:.0f} |")
    return lines


def _never(self: AmaxHistory, role: Role, current: Tensor) -> None:
    self.history[role][0] = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for run in planned():
        results[run.name] = result(run, options.steps)
        print(run.name, results[run.name], flush=True)
    text = report(product_errors(), table(results, options.steps))
    print(text)
    if options.out:
        options.out.write_text(text)


def report(errors: list[str], curves: list[str]) -> str:
    return "\n".join(
        [
            "# FP8 recipes, emulated on the CPU",
            "",
            f"Made by bench/precision.py with torch {torch.__version__}, one thread. Products of 192 x 512 "
            "with 512 x 320, e4m3; distances are of Frobenius norms.",
            "",
            *errors,
            "",
            "Training: 4 layers, hidden 192, supervised, 456 new tokens a step; the language's own entropy "
            f"is {ENTROPY:.4f}. Loss is that of 3,800 tokens no run trains on. Seconds are wall time, of a "
            "machine that may be busy.",
            "",
            *curves,
            "",
        ]
    )


if __name__ == "__main__":
    main()
