"""Bias and variance of each row's gradient, against the true gradient of a policy small enough to enumerate.

The estimators are called as the trainer calls them; nothing here trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hpt_mega.objective.algorithms import algorithm
from hpt_mega.objective.batch import TokenBatch
from hpt_mega.objective.estimator import Estimator, Row
from hpt_mega.scheduler.gate import gate
from hpt_mega.trajectory import Source

WORDS, LENGTH = 4, 4  # word 0 ends a sequence; all 121 sequences of at most LENGTH words are known
EASIEST, HARDEST = 0.5, 0.01  # pass rates of the first and the last question


@dataclass(frozen=True)
class Finding:
    """What N resamplings say of one row's gradient estimate g, beside the true gradient G of E[R].

    bias and noise are in units of |G|: noise is what the mean of N unbiased estimates would be off by, so a
    bias not far above it is none that was seen. variance is tr cov(g) / |E g|².
    """

    row: str
    staleness: float
    bias: float  # |mean g - G| / |G|
    noise: float  # sqrt(tr cov(g) / N) / |G|
    cosine: float  # of mean g and G; what is left of the bias when the learning rate is free
    variance: float


class World:
    """Q questions with verifiable answers, and a softmax policy over them: theta [Q, previous word, word].

    The reference model is theta itself; the policy that made the rollouts is theta moved at random by
    `staleness`, as if updates had come in between.
    """

    def __init__(self, questions: int, staleness: float, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.words_ST, self.mask_ST = _all_sequences()
        shape = (questions, WORDS, WORDS)
        self.theta = torch.randn(shape, dtype=torch.float64, generator=self.generator) / 2
        noise = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        self.theta.requires_grad_()
        self.old_QST = self.logp(self.theta.detach() + staleness * noise)
        self.entropy_QST = self._entropy()
        self.reward_QS = self._answers(self.logp(self.theta).detach().sum(2).exp())
        self.old_QS = self.old_QST.sum(2).exp()
        self.values_QST = self._values()

    def logp(self, theta: Tensor) -> Tensor:
        """[Q, S, T] log-probability of each word of each sequence, 0 after its end."""
        return torch.where(self.mask_ST, theta.log_softmax(2)[:, self._previous(), self.words_ST], 0.0)

    def true_gradient(self) -> Tensor:
        """d mean_q E[R] / d theta, flat."""
        expected = (self.logp(self.theta).sum(2).exp() * self.reward_QS).sum(1).mean()
        return torch.autograd.grad(expected, self.theta)[0].flatten()

    def rollouts(self, count: int) -> Tensor:
        """[Q, count] indices of sequences drawn from the policy of the rollouts."""
        return torch.multinomial(self.old_QS, count, replacement=True, generator=self.generator)

    def demonstrations(self) -> Tensor:
        """[Q, 1] indices of one right sequence of each question, all equally likely."""
        return torch.multinomial(self.reward_QS, 1, generator=self.generator)

    def _previous(self) -> Tensor:
        return torch.cat([torch.zeros_like(self.words_ST[:, :1]), self.words_ST[:, :-1]], dim=1)

    def _entropy(self) -> Tensor:
        logits = self.theta.detach().log_softmax(2)
        return -(logits.exp() * logits).sum(2)[:, self._previous()]

    def _answers(self, probability_QS: Tensor) -> Tensor:
        """Reward 1 for the sequences of a random set whose probability is the question's pass rate."""
        questions, sequences = probability_QS.shape
        rates = torch.logspace(math.log10(EASIEST), math.log10(HARDEST), questions, dtype=torch.float64)
        reward = torch.zeros_like(probability_QS)
        for q in range(questions):
            order = torch.randperm(sequences, generator=self.generator)
            order = order[probability_QS[q, order] <= rates[q]]
            reward[q, order[probability_QS[q, order].cumsum(0) <= rates[q]]] = 1.0
        return reward

    def _values(self) -> Tensor:
        """[Q, S, T] expected reward before each word: a critic without error, of the rollouts' policy."""
        worth_QS = self.old_QS * self.reward_QS
        values = torch.zeros_like(self.old_QST)
        for t in range(LENGTH):
            same = (self.words_ST[:, None, :t] == self.words_ST[None, :, :t]).all(2).double()
            values[:, :, t] = (worth_QS @ same) / (self.old_QS @ same)
        return values


def diagnose_gradient(
    names: Sequence[str],
    *,
    questions: int = 6,
    rollouts: int = 8,
    resamplings: int = 400,
    staleness: float = 0.0,
    own_normaliser: bool = False,
    seed: int = 0,
) -> list[Finding]:
    """One finding a row, each over the same draws of rollouts and demonstrations.

    Sums over tokens and means over sequences take the place of a row's normaliser, unless own_normaliser:
    so the scale of an unbiased row is that of the true gradient. Raises ValueError for an unknown row and
    for counts that are too small.
    """
    for name, count, least in (
        ("questions", questions, 1), ("rollouts", rollouts, 2), ("resamplings", resamplings, 2),
    ):  # fmt: skip
        if count < least:
            raise ValueError(f"{name} must be at least {least}; got {count}")
    found = []
    for name in names:
        estimator = algorithm(name)
        if not own_normaliser:
            length = 0.5 if estimator.row.aggregation == "pair_mean" else 1.0  # two sequences make a pair
            estimator = algorithm(name, aggregation="constant", length=length)
        world = World(questions, staleness, seed)
        truth = world.true_gradient()
        estimates = torch.stack([_estimate(estimator, world, rollouts) for _ in range(resamplings)])
        found.append(_finding(name, staleness, estimates, truth))
    return found


def _finding(name: str, staleness: float, estimates: Tensor, truth: Tensor) -> Finding:
    mean, scale = estimates.mean(0), float(truth.norm())
    trace = float(estimates.var(0).sum())
    size = float(mean.norm())
    return Finding(
        row=name,
        staleness=staleness,
        bias=float((mean - truth).norm()) / scale,
        noise=math.sqrt(trace / len(estimates)) / scale,
        cosine=float(mean @ truth) / (size * scale) if size else 0.0,
        variance=trace / size**2 if size else math.inf,
    )


def _estimate(estimator: Estimator, world: World, rollouts: int) -> Tensor:
    """The row's gradient of one step, as ascent: minus the gradient of its loss, flat."""
    drawn_QM = torch.cat([world.rollouts(rollouts), world.demonstrations()], dim=1)  # the same for every row
    keep_QM = _kept(estimator.row, world.reward_QS.gather(1, drawn_QM[:, :-1]))
    if not bool(keep_QM.any()):
        return torch.zeros(world.theta.numel(), dtype=torch.float64)
    question_B, column_B = keep_QM.nonzero(as_tuple=True)
    sequence_B = drawn_QM[question_B, column_B]
    logp_BT = world.logp(world.theta)[question_B, sequence_B]
    batch = TokenBatch(
        logp=logp_BT,
        mask=world.mask_ST[sequence_B],
        old_logp=world.old_QST[question_B, sequence_B],
        ref_logp=logp_BT.detach(),
        values=world.values_QST[question_B, sequence_B],
        entropy=world.entropy_QST[question_B, sequence_B],
        reward=world.reward_QS[question_B, sequence_B],
        group=question_B,
        source=torch.where(column_B == rollouts, Source.OFFLINE.value, Source.ONLINE.value),
        pair=question_B,
    )
    return -torch.autograd.grad(estimator(batch).loss, world.theta)[0].flatten()


def _kept(row: Row, reward_QN: Tensor) -> Tensor:
    """[Q, N + 1] bool: the rollouts, and last the demonstration, that the row trains on."""
    if row.parts.advantage == "preference":  # the best and the worst rollout, where they differ
        best_Q, worst_Q = reward_QN.argmax(1, keepdim=True), reward_QN.argmin(1, keepdim=True)
        keep = (
            torch.zeros_like(reward_QN, dtype=torch.bool).scatter(1, best_Q, True).scatter(1, worst_Q, True)
        )
        keep &= (reward_QN.amax(1) > reward_QN.amin(1))[:, None]
        return torch.cat([keep, torch.zeros_like(keep[:, :1])], dim=1)
    alpha_Q, beta_Q = _GATES.get(row.name, _ROLLOUTS)(reward_QN.mean(1))
    return torch.cat([(alpha_Q > 0)[:, None].expand_as(reward_QN), (beta_Q > 0)[:, None]], dim=1)


_ROLLOUTS, _BOTH = gate("switch", threshold=-1.0), gate("soft", threshold=1.0)
_GATES = {  # what conf/algorithm gives the rows that learn from demonstrations
    "sft": gate("switch", threshold=1.0),
    "hpt": gate("switch", threshold=0.0),
    "srft": _BOTH,
    "srft_entropy": _BOTH,
    "luffy": _BOTH,
}


def _all_sequences() -> tuple[Tensor, Tensor]:
    """(words [S, T], mask [S, T]) of every sequence: it ends with word 0 or at LENGTH words."""
    every = torch.cartesian_prod(*[torch.arange(WORDS)] * LENGTH)
    ended = (every == 0).cumsum(1) - (every == 0).long() > 0  # after the first 0
    words = torch.unique(torch.where(ended, 0, every), dim=0)
    return words, (words == 0).cumsum(1) - (words == 0).long() == 0


def table(findings: Sequence[Finding]) -> str:
    """The findings as Markdown."""
    lines = [
        "| row | staleness | bias / ‖G‖ | its noise | cosine | variance |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {f.row} | {f.staleness:g} | {f.bias:.3f} | {f.noise:.3f} | {f.cosine:.3f} | {f.variance:.2f} |"
        for f in findings
    ]
    return "\n".join(lines) + "\n"


def plot(findings: Sequence[Finding], path: Path) -> None:
    """A PNG with 1 - cosine against variance, one panel a staleness: low and left is better."""
    import matplotlib.pyplot as plt

    levels = list(dict.fromkeys(finding.staleness for finding in findings))
    figure, axes = plt.subplots(
        1, len(levels), figsize=(6 * len(levels), 5), squeeze=False, sharex=True, sharey=True
    )
    for axis, level in zip(axes[0], levels, strict=True):
        shown = [f for f in findings if f.staleness == level and math.isfinite(f.variance)]
        axis.scatter([f.variance for f in shown], [1 - f.cosine for f in shown], color="#2a6f97")
        for f in shown:
            axis.annotate(
                f.row, (f.variance, 1 - f.cosine), xytext=(4, 4), textcoords="offset points", fontsize=8
            )
        axis.set(
            xscale="log", yscale="log", title=f"staleness {level:g}", xlabel="variance: tr cov / |mean|²"
        )
    axes[0][0].set_ylabel("bias of the direction: 1 - cosine with the true gradient")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
