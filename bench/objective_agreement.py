"""Agreement of every row with its published loss, and what the split into micro-batches moves.

    PYTHONPATH=. python bench/objective_agreement.py --out bench/results/objective_agreement.md

Batches, published losses and splits are those of tests/objective; here more of them, with the figures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from hpt_mega.objective import rows
from tests.objective import published, splits

Halves = Callable[[splits.Fields, list[Tensor]], tuple[Tensor, Tensor]]


def agreement(seeds: int) -> list[str]:
    """Markdown: the largest differences of each row."""
    lines = [
        "| row | max difference from the published gradient, fp64 | largest gradient | "
        + " | ".join(f"loss, {k} micro-batches | gradient, {k}" for k in splits.SPLITS)
        + " |",
        "|---" * (3 + 2 * len(splits.SPLITS)) + "|",
    ]
    for row in rows():
        found = [published.difference(row.name, seed) for seed in range(seeds)]
        cells = [f"{max(off for off, _ in found):.1e}", f"{max(size for _, size in found):.0e}"]
        for parts in splits.SPLITS:
            moved = [splits.moved_by_split(row.name, parts, seed) for seed in range(seeds)]
            cells += [f"{max(loss for loss, _ in moved):.1e}", f"{max(grad for _, grad in moved):.1e}"]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return lines


def balance(seeds: int) -> list[str]:
    """Markdown: how HPT's gradient moves between splits, by the authors' normalisation and by ours."""
    ways: dict[str, Halves] = {
        "authors, summed over micro-batches": lambda f, p: splits.authors_gradient(f, p, averaged=False),
        "authors, averaged over micro-batches": lambda f, p: splits.authors_gradient(f, p, averaged=True),
        "ours (hpt)": splits.hpt_gradient,
    }
    lines = [
        "| normalisation | micro-batches | change of the gradient, relative | its angle | SFT : RL |",
        "|---|---|---|---|---|",
    ]
    for title, gradient in ways.items():
        for parts in (1, *splits.SPLITS):
            found = [_moved(gradient, parts, seed) for seed in range(seeds)]
            change, angle, ratio = (sum(column) / seeds for column in zip(*found, strict=True))
            lines.append(f"| {title} | {parts} | {change:.1e} | {angle:.2f}° | {ratio:.3f} |")
    return lines


def _moved(gradient: Halves, parts: int, seed: int) -> tuple[float, float, float]:
    """(relative change, angle in degrees, norm of SFT / norm of RL) from one micro-batch to `parts`."""
    fields = splits.step("hpt", seed)
    whole = [torch.arange(2 * splits.PAIRS)]
    base = sum(gradient(fields, whole)).double()
    rl, sft = gradient(fields, whole if parts == 1 else splits.uneven(parts, seed, pairs=False))
    total = (rl + sft).double()
    cosine = (total * base).sum() / (total.norm() * base.norm())
    angle = float(torch.rad2deg(torch.acos(cosine.clamp(max=1.0))))
    return float((total - base).norm() / base.norm()), angle, float(sft.norm() / rl.norm())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Agreement of the objective",
        "",
        f"Written by `python bench/objective_agreement.py`: the largest of {options.seeds} random batches",
        "with clipped tokens, negative advantages, padding, unequal lengths, groups of size 1 and groups of",
        "equal rewards. Targets: 1e-10 from the published gradient in fp64; 1e-6 between splits in fp32 (of",
        "the loss and of the gradient of parameters all tokens share), with a KL and an entropy term too.",
        "",
        *agreement(options.seeds),
        "",
        "## SFT and RL in one step, split into uneven micro-batches",
        "",
        "The authors' code divides the SFT loss by the tokens of a micro-batch and the RL loss by the padded",
        "length, so the balance of the two moves with the split. Means over the same batches, fp32.",
        "",
        *balance(options.seeds),
        "",
    ]
    text = "\n".join(lines)
    if options.out:
        options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
