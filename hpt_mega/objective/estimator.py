"""The Unified Policy Gradient Estimator (arXiv 2509.04419): a row of the table, ready to be called.

The equation lives in surrogate.py, the table in algorithms.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hpt_mega.objective.advantage import SEQUENCE_ADVANTAGES, TOKEN_ADVANTAGES
from hpt_mega.objective.aggregation import AGGREGATIONS
from hpt_mega.objective.batch import TokenBatch
from hpt_mega.objective.metrics import means, sums
from hpt_mega.objective.options import Options
from hpt_mega.objective.regularizer import kl_penalty, penalises_reward, regularizer
from hpt_mega.objective.surrogate import Parts, surrogate
from hpt_mega.trajectory import Source


@dataclass(frozen=True)
class Row:
    """One line of the table of algorithms."""

    name: str
    paper: str
    formula: str  # the gradient of the objective, per token unless it says otherwise
    parts: Parts  # for rollouts; for every sequence where any_source
    aggregation: str
    offline: Parts | None = None  # for demonstrations
    imitation: Parts | None = None  # a second term for demonstrations, beside `offline`
    any_source: bool = False
    options: Options = field(default_factory=Options)


@dataclass(frozen=True, eq=False)
class Output:
    """What a loss returns; loss = loss_sum / denominator."""

    loss: Tensor  # 0-d, with gradient
    loss_sum: Tensor  # 0-d, with gradient
    denominator: float
    token_weight: Tensor  # [B, T] d loss_sum / d logp, detached
    sums: dict[str, float]  # what metrics are made of; those of several calls add up

    @property
    def metrics(self) -> dict[str, float]:
        """By name, as `metrics.means` lists them."""
        return means(self.sums)


class Estimator:
    """A row of the table as a loss function."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def __call__(self, batch: TokenBatch, denominator: float | None = None) -> Output:
        """The loss whose gradient is the row's estimator: sum of weight * scale * L_t over a denominator.

        `denominator` is the sum of `self.denominator` over the step's micro-batches and data-parallel
        ranks; without it the batch stands alone. The value of the loss is a surrogate's, only its gradient
        is the published loss's.

        Raises ValueError for a field the row needs and does not get, for offline sequences in a row without
        an offline half, for a denominator that is not positive, and for one given to a row whose `constant`
        aggregation has no length: the batch's own would make the loss depend on the split.
        """
        is_own_length = self.row.aggregation == "constant" and self.row.options.length is None
        if denominator is not None and is_own_length:
            raise ValueError(
                f"a denominator was given, and {self.row.name}'s aggregation 'constant' divides by the "
                "length of the batch; give the algorithm the step's, length=..."
            )
        if denominator is None:
            denominator = self.denominator(batch) or 1.0  # nothing under the mask: a loss of 0
        if not denominator > 0:
            raise ValueError(f"denominator must be above 0; got {denominator}")
        options = self.row.options
        with torch.enable_grad():
            if not batch.logp.requires_grad:
                batch = replace(batch, logp=batch.logp.detach().requires_grad_())
            first, *rest = [
                surrogate(parts, own, batch, options) for parts, own in self._halves(batch.offline)
            ]
            whole = sum(rest, first)
            token_loss = whole.loss + regularizer(batch, options)
            if self.row.imitation is not None:
                token_loss = token_loss + self._imitate(self.row.imitation, batch)
            scale, _ = AGGREGATIONS[self.row.aggregation](batch, options)
            weight = scale * self._sequence_weight(batch)[:, None] * batch.mask
            loss_sum = (weight * token_loss).sum()
            (token_weight,) = torch.autograd.grad(loss_sum, batch.logp, retain_graph=True)
        found = sums(batch, whole, token_weight)
        return Output(loss_sum / denominator, loss_sum, float(denominator), token_weight, found)

    def denominator(self, batch: TokenBatch) -> float:
        """This batch's share of the denominator; add up those of all micro-batches and ranks."""
        return float(AGGREGATIONS[self.row.aggregation](batch, self.row.options)[1])

    @property
    def advantage_per_sequence(self) -> bool:
        """Whether `advantages` can tell the advantage before the batch is built (not for GAE and DPO)."""
        return self.advantage_names <= SEQUENCE_ADVANTAGES.keys()

    @property
    def trains_on_pairs(self) -> bool:
        """Whether a batch consists of pairs (TokenBatch.pair)."""
        return "preference" in self.advantage_names

    @property
    def needs_reference_model(self) -> bool:
        """Whether TokenBatch.ref_logp has to be given."""
        return self.trains_on_pairs or self.row.options.kl_coef != 0

    @property
    def penalises_reward(self) -> bool:
        """Whether the KL to the reference model is subtracted from the rewards (kl_in=reward)."""
        return penalises_reward(self.row.options)

    @property
    def needs_values(self) -> bool:
        """Whether TokenBatch.values have to be given."""
        return "gae" in self.advantage_names

    @property
    def advantage_names(self) -> set[str]:
        """Those of its halves."""
        return {parts.advantage for parts in (self.row.parts, self.row.offline) if parts is not None}

    def kl_penalty(self, batch: TokenBatch) -> Tensor:
        """[B, T] what the KL to the reference model takes from each token's reward; 0 unless kl_in=reward.

        Raises ValueError where it is needed and ref_logp is not given.
        """
        if not self.penalises_reward:
            return torch.zeros_like(batch.logp).detach()
        return kl_penalty(batch, self.row.options)

    def advantages(
        self, reward: Tensor, group: Tensor, source: Tensor | None = None, kl: Tensor | None = None
    ) -> Tensor:
        """Advantage [N] of every sequence of a step, to be taken before it is split into micro-batches.

        reward [N], group [N] int, source [N] int (default: all online), kl [N] the sums of kl_penalty over
        tokens, with kl_in=reward. Each value, repeated over the tokens, is a row of TokenBatch.advantage.
        Raises ValueError where a row's advantage is not one number a sequence, for NaN, and for a missing kl.
        """
        if kl is None and self.penalises_reward:
            raise ValueError("kl_in 'reward' needs kl, the sums of Estimator.kl_penalty over the tokens")
        reward = reward if kl is None else reward - kl
        reward = reward.to(torch.promote_types(reward.dtype, torch.float32))
        if not bool(reward.isfinite().all()):
            raise ValueError("reward holds NaN or infinity; expected finite numbers")
        offline = torch.zeros_like(group, dtype=torch.bool) if source is None else source == Source.OFFLINE
        advantage = torch.zeros_like(reward)
        for parts, own in self._halves(offline):
            if parts.advantage in TOKEN_ADVANTAGES:
                raise ValueError(
                    f"{self.row.name}: advantage '{parts.advantage}' is not one number a sequence; leave "
                    "TokenBatch.advantage out and call the estimator on the batch"
                )
            found = SEQUENCE_ADVANTAGES[parts.advantage](reward, group, own, self.row.options)
            advantage = torch.where(own, found, advantage)
        return advantage

    def trains_on(self, advantage: float, weight: float = 1.0) -> bool:
        """Whether such a sequence may have a gradient; KL, entropy and imitation pull even at advantage 0."""
        options = self.row.options
        pulls_always = (
            self.row.imitation is not None
            or (options.kl_coef != 0 and options.kl_in == "loss")
            or options.entropy_coef != 0
        )
        return weight != 0 and (advantage != 0 or pulls_always)

    def _sequence_weight(self, batch: TokenBatch) -> Tensor:
        """[B] alpha of rollouts; beta of demonstrations, times the row's coefficient of its offline half."""
        weight = batch.require("weight", "the loss")
        if self.row.offline is None:
            return weight
        return torch.where(batch.offline, self.row.options.offline_coef * weight, weight)

    def _imitate(self, parts: Parts, batch: TokenBatch) -> Tensor:
        """[B, T] the demonstrations' second term; an advantage given to the batch is not its own."""
        return surrogate(parts, batch.offline, replace(batch, advantage=None), self.row.options).loss

    def _halves(self, offline: Tensor) -> Iterator[tuple[Parts, Tensor]]:
        """The row's four parts and the sequences [B] bool they apply to, for rollouts and demonstrations."""
        if self.row.any_source:
            yield self.row.parts, torch.ones_like(offline)
            return
        if self.row.offline is None and bool(offline.any()):
            raise ValueError(
                f"{self.row.name} trains on rollouts only and got {int(offline.sum())} offline sequences; "
                "take them out, or use a row with an offline half: hpt, luffy, srft"
            )
        yield self.row.parts, ~offline
        if self.row.offline is not None:
            yield self.row.offline, offline
