"""Part 3 of the estimator: the advantage estimate.

Sequence advantages depend on rewards and groups alone, so they are computed on a whole step before it is
split; token advantages (GAE, DPO) need the batch itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hpt_mega.objective import value
from hpt_mega.objective.batch import TokenBatch
from hpt_mega.objective.options import Options
from hpt_mega.objective.regularizer import kl_penalty, penalises_reward

# (reward [N], group [N], own [N] bool: the sequences this half of the row trains on, options) -> [N]
SequenceAdvantage = Callable[[Tensor, Tensor, Tensor, Options], Tensor]
TokenAdvantage = Callable[[TokenBatch, Options], Tensor]  # -> [B, T]


def one(reward: Tensor, group: Tensor, own: Tensor, options: Options) -> Tensor:
    """A = 1 (SFT)."""
    return torch.ones_like(reward)


def correct(reward: Tensor, group: Tensor, own: Tensor, options: Options) -> Tensor:
    """A = 1 for a positive reward, else 0 (rejection-sampling fine-tuning)."""
    return (reward > 0).to(reward.dtype)


def sign(reward: Tensor, group: Tensor, own: Tensor, options: Options) -> Tensor:
    """A = +1 for a positive reward, else -1."""
    return 2 * correct(reward, group, own, options) - 1


def reward_itself(reward: Tensor, group: Tensor, own: Tensor, options: Options) -> Tensor:
    """A = R (REINFORCE)."""
    return reward


def group_mean(reward: Tensor, group: Tensor, own: Tensor, options: Options) -> Tensor:
    """A = R - mean of the group (Dr.GRPO, arXiv 2503.20783); the group's own-source sequences only."""
    return _center(reward, _Groups(reward, group, own))


def group_norm(reward: Tensor, group: Tensor, own: Tensor, options: Options) -> Tensor:
    """A = (R - mean) / (std + std_eps) of the group, unbiased std (GRPO, arXiv 2402.03300)."""
    groups = _Groups(reward, group, own)
    centered = _center(reward, groups)
    variance = groups.sum(centered.square()) / (groups.size - 1).clamp(min=1)
    return centered / torch.where(groups.equal, 1.0, variance.sqrt() + options.std_eps)


def group_ratio(reward: Tensor, group: Tensor, own: Tensor, options: Options) -> Tensor:
    """A = (R - mean) / mean of the group, 0 unless mean > 0: estimates ∇log P (MaxRL, arXiv 2602.02710)."""
    groups = _Groups(reward, group, own)
    mean = groups.mean(reward)
    return torch.where(mean > 0, _center(reward, groups) / mean, 0.0)


def joint_group_norm(reward: Tensor, group: Tensor, own: Tensor, options: Options) -> Tensor:
    """group_norm over rollouts and demonstrations of a question together (LUFFY, SRFT)."""
    return group_norm(reward, group, torch.ones_like(own), options)


def joint_group_mean(reward: Tensor, group: Tensor, own: Tensor, options: Options) -> Tensor:
    """group_mean over rollouts and demonstrations together (LUFFY's own runs leave the std out)."""
    return group_mean(reward, group, torch.ones_like(own), options)


def leave_one_out(reward: Tensor, group: Tensor, own: Tensor, options: Options) -> Tensor:
    """A = R - mean of the other sequences of the group (RLOO, arXiv 2402.14740)."""
    groups = _Groups(reward, group, own)
    return _center(reward, groups) * groups.size / (groups.size - 1).clamp(min=1)


def batch_norm(reward: Tensor, group: Tensor, own: Tensor, options: Options) -> Tensor:
    """A = (R - mean) / (std + std_eps) over the step's own-source sequences (REINFORCE++, 2501.03262)."""
    return group_norm(reward, torch.zeros_like(group), own, options)


def gae(batch: TokenBatch, options: Options) -> Tensor:
    """Generalised advantage estimation (value.py); a KL penalty in the reward falls on its own token."""
    values = batch.require("values", "advantage 'gae'")
    reward = batch.require("reward", "advantage 'gae'")
    penalty = kl_penalty(batch, options) if penalises_reward(options) else None
    return value.gae(reward, values, batch.mask, options.gae_gamma, options.gae_lambda, penalty)[0]


def preference(batch: TokenBatch, options: Options) -> Tensor:
    """A = +β σ(-Δ) for the chosen, -β σ(-Δ) for the rejected sequence of a pair (DPO, arXiv 2305.18290).

    Δ = β (h_chosen - h_rejected) with h = log π_θ(τ) - log π_ref(τ). The higher reward is the chosen one.
    """
    ref_logp = batch.require("ref_logp", "advantage 'preference'")
    reward = batch.require("reward", "advantage 'preference'")
    other = _partners(batch.require("pair", "advantage 'preference'"))
    if bool((tied := reward == reward[other]).any()):
        raise ValueError(
            f"TokenBatch.reward ties within the pair of sequence {int(tied.nonzero()[0])}; "
            "a pair needs a higher reward for the chosen one"
        )
    h = (batch.logp.detach() - ref_logp).sum(1)
    direction = torch.where(reward > reward[other], 1.0, -1.0).to(h.dtype)
    margin = options.beta * direction * (h - h[other])
    return (options.beta * direction * torch.sigmoid(-margin))[:, None].expand_as(batch.logp)


class _Groups:
    """Sums over the own-source members of each sequence's group."""

    def __init__(self, reward: Tensor, group: Tensor, own: Tensor) -> None:
        ids, self._index = torch.unique(group, return_inverse=True)
        self._count, self._own = len(ids), own
        self.size = self.sum(torch.ones_like(reward))
        infinity = torch.full_like(reward, float("inf"))
        lowest = self._reduce(torch.where(own, reward, infinity), "amin")
        highest = self._reduce(torch.where(own, reward, -infinity), "amax")
        self.equal = lowest >= highest  # also a group of size 1, and one without own members

    def sum(self, x: Tensor) -> Tensor:
        """[N]: the sum over own members of each sequence's group."""
        total = x.new_zeros(self._count).index_add_(0, self._index, torch.where(self._own, x, 0.0))
        return total[self._index]

    def mean(self, x: Tensor) -> Tensor:
        """[N]: the mean over them; 0 where there are none."""
        return self.sum(x) / self.size.clamp(min=1)

    def _reduce(self, x: Tensor, how: str) -> Tensor:
        result = x.new_zeros(self._count).scatter_reduce_(0, self._index, x, how, include_self=False)
        return result[self._index]


def _center(reward: Tensor, groups: _Groups) -> Tensor:
    """R - mean, exactly 0 where all rewards of a group are equal: there is nothing to learn from them."""
    return torch.where(groups.equal, 0.0, reward - groups.mean(reward))


def _partners(pair: Tensor) -> Tensor:
    """[B]: the index of the other sequence of each one's pair."""
    same = (pair[:, None] == pair[None, :]) & ~torch.eye(len(pair), dtype=torch.bool, device=pair.device)
    if bool((lonely := same.sum(1) != 1).any()):
        which = int(pair[lonely.nonzero()[0, 0]])
        raise ValueError(f"TokenBatch.pair {which} must occur exactly twice in a batch; keep pairs together")
    return same.to(torch.uint8).argmax(1)


SEQUENCE_ADVANTAGES: dict[str, SequenceAdvantage] = {
    "one": one,
    "correct": correct,
    "sign": sign,
    "reward": reward_itself,
    "group_mean": group_mean,
    "group_norm": group_norm,
    "group_ratio": group_ratio,
    "joint_group_mean": joint_group_mean,
    "joint_group_norm": joint_group_norm,
    "leave_one_out": leave_one_out,
    "batch_norm": batch_norm,
}
TOKEN_ADVANTAGES: dict[str, TokenAdvantage] = {"gae": gae, "preference": preference}

# those that read a reward as right or wrong: a KL taken from it would make some of both
READS_RIGHT_OR_WRONG = frozenset({"correct", "sign", "group_ratio"})
# those of rollouts and demonstrations together
JOINT = frozenset({"joint_group_mean", "joint_group_norm"})
# those that depend on no other sequence
OWN = frozenset({"one", "correct", "sign", "reward"})
# those that a single rollout a question teaches nothing
COMPARES_ROLLOUTS = frozenset({"group_mean", "group_norm", "group_ratio", "leave_one_out", "preference"})
_WITHOUT_GROUP = OWN | {"batch_norm"}


def advantage_of(name: str, batch: TokenBatch, own: Tensor, options: Options) -> Tensor:
    """[B, T] the named advantage of a batch, or the one it was given."""
    if batch.advantage is not None:
        return batch.advantage.detach()
    if name in TOKEN_ADVANTAGES:
        return TOKEN_ADVANTAGES[name](batch, options)
    nothing = torch.zeros(len(batch), dtype=torch.long, device=batch.logp.device)
    why = f"advantage '{name}'"
    reward = nothing.to(batch.logp.dtype) if name == "one" else batch.require("reward", why)
    if name != "one" and penalises_reward(options):
        reward = reward - kl_penalty(batch, options).sum(1)
    group = nothing if name in _WITHOUT_GROUP else batch.require("group", why)
    return SEQUENCE_ADVANTAGES[name](reward, group, own, options)[:, None].expand_as(batch.logp)
