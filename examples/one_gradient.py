"""SFT, RL and HPT as one gradient: the push that each row of the table gives to the tokens of one question.

    python examples/one_gradient.py [ROW...]

Four rollouts of a question and its demonstration, once with a right rollout and once without. The push is
d(-loss)/d(log-probability), the mean over a sequence's tokens. HPT's gate looks at the pass rate: a solved
question teaches by its rollouts, an unsolved one by its demonstration. This needs torch alone.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from hpt_mega.objective import Estimator, TokenBatch, algorithm, rows
from hpt_mega.scheduler import gate

ROWS = ("sft", "reinforce", "grpo", "dr_grpo", "cispo", "luffy", "hpt")
LENGTHS = torch.tensor([3, 5, 4, 6, 5])  # response tokens: four rollouts, then the demonstration
LONGEST = int(LENGTHS.max())


def question(reward: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """The fields of a TokenBatch: 5 sequences padded to 6 tokens."""
    generator = torch.Generator().manual_seed(0)
    logp = -torch.rand(len(LENGTHS), LONGEST, generator=generator)
    return {
        "logp": logp,
        "old_logp": logp + 0.3 * torch.randn(logp.shape, generator=generator),  # when they were sampled
        "mask": torch.arange(LONGEST) < LENGTHS[:, None],
        "reward": reward,
        "group": torch.zeros(len(LENGTHS), dtype=torch.long),
        "source": torch.tensor([0, 0, 0, 0, 1]),
        "weight": weight,
    }


def estimator(name: str) -> Estimator:
    """The row; one that divides by a length, whatever was sampled, is given the longest possible."""
    plain = algorithm(name)
    return algorithm(name, length=LONGEST) if plain.row.aggregation == "constant" else plain


def pushes(name: str, right: int) -> list[float]:
    """The push on each sequence of the question, `right` of whose four rollouts are right."""
    reward = torch.tensor([1.0] * right + [0.0] * (4 - right) + [1.0])
    alpha, beta = gate("switch")(reward[:4].mean()[None]) if name == "hpt" else torch.ones(2, 1)
    weight = torch.cat([alpha.expand(4), beta])
    chosen = estimator(name)
    taken = torch.arange(4 if chosen.row.offline is None else 5)
    if name == "sft":
        taken = torch.tensor([4])
    out = chosen(TokenBatch(**{field: value[taken] for field, value in question(reward, weight).items()}))
    found = torch.full((len(LENGTHS),), torch.nan)
    found[taken] = -(out.token_weight / out.denominator).sum(1) / LENGTHS[taken] + 0.0
    return found.tolist()


def is_shown(name: str) -> bool:
    """Whether the row needs no more than `question` gives: no critic, no reference policy, no entropy."""
    try:
        pushes(name, right=1)
    except ValueError:
        return False
    return True


def main() -> None:
    chosen = sys.argv[1:] or ROWS
    shown = [row.name for row in rows() if is_shown(row.name)]
    if others := [name for name in chosen if name not in shown]:
        sys.exit(f"cannot show {', '.join(others)}; give some of: {', '.join(shown)}")
    for right in (1, 0):
        print(f"{right} of 4 rollouts right")
        print(f"  {'row':12}" + "".join(f"{f'rollout {i}':>12}" for i in range(1, 5)) + "  demonstration")
        for name in chosen:
            cells = ["-" if push != push else f"{push:+.4f}" for push in pushes(name, right)]
            print(f"  {name:12}" + "".join(f"{cell:>12}" for cell in cells[:4]) + f"{cells[4]:>15}")


if __name__ == "__main__":
    main()
