"""The published loss of every row, written out on its own, and the random batches it is compared on.

The losses work sequence by sequence on the unpadded tokens, in fp64, by autograd.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpt_mega.objective import TokenBatch, algorithm

GROUPS = [4, 4, 4, 4, 9, 7, 7, 7, 2, 2, 2, 2]  # sizes 4, 1, 3 (equal rewards), 4
T = 7


@dataclass
class Case:
    """One random batch, and its sequences without padding."""

    logp: Tensor
    fields: dict[str, Tensor]

    def batch(self) -> TokenBatch:
        return TokenBatch(logp=self.logp, **self.fields)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.logp, retain_graph=True)[0]

    def sequence(self, i: int, name: str) -> Tensor:
        source = self.logp if name == "logp" else self.fields[name]
        return source[i][self.fields["mask"][i]]

    def number(self, i: int, name: str) -> float:
        return float(self.fields[name][i])

    @property
    def indices(self) -> range:
        return range(len(self.logp))

    @property
    def tokens(self) -> int:
        return int(self.fields["mask"].sum())

    def mates(self, i: int, online_only: bool = False) -> list[float]:
        """Rewards of the sequences of i's group."""
        group, source = self.fields["group"], self.fields["source"]
        same = [j for j in self.indices if group[j] == group[i]]
        return [self.number(j, "reward") for j in same if not (online_only and source[j] == 1)]


def make_case(seed: int, offline: bool = False) -> Case:
    generator = torch.Generator().manual_seed(seed)
    sequences = len(GROUPS)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    mask = torch.rand(sequences, T, generator=generator) < 0.7
    mask[:, 2] = True
    mask[3, 1:], mask[5] = False, True
    mask[3, 2] = True
    logp = -normal(sequences, T).abs() * 2
    reward = torch.where(torch.rand(sequences, generator=generator) < 0.5, 1.0, 0.0).double()
    reward[0:2] = torch.tensor([1.0, 0.0])
    reward[5:8] = 1.0
    reward[9] = torch.rand((), dtype=torch.float64, generator=generator)
    source = torch.zeros(sequences, dtype=torch.long)
    if offline:
        source[[1, 6, 11]] = 1
    fields = {
        "old_logp": logp + 0.4 * normal(sequences, T),
        "ref_logp": logp + normal(sequences, T),
        "values": normal(sequences, T),
        "entropy": normal(sequences, T).abs(),
        "mask": mask,
    }
    for name in ("old_logp", "ref_logp", "values", "entropy"):
        fields[name][~mask] = float("nan")  # padding may hold anything
    logp[~mask] = float("-inf")
    fields |= {"reward": reward, "group": torch.tensor(GROUPS), "source": source}
    return Case(logp.requires_grad_(), fields)


def normed(reward: float, mates: list[float], eps: float = 1e-6) -> float:
    if len(mates) < 2 or len(set(mates)) == 1:
        return 0.0
    return (reward - statistics.mean(mates)) / (statistics.stdev(mates) + eps)


def token_average(case: Case, per_token: Callable[[int], Tensor]) -> Tensor:
    return torch.cat([per_token(i) for i in case.indices]).mean()


def sequence_average(case: Case, per_token: Callable[[int], Tensor]) -> Tensor:
    return torch.stack([per_token(i).mean() for i in case.indices]).mean()


def dr_average(case: Case, per_token: Callable[[int], Tensor], length: float) -> Tensor:
    return torch.stack([per_token(i).sum() / length for i in case.indices]).mean()


def ppo_clip(case: Case, i: int, advantage: Tensor | float, low: float = 0.2, high: float = 0.2) -> Tensor:
    ratio = torch.exp(case.sequence(i, "logp") - case.sequence(i, "old_logp"))
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def grpo_advantage(case: Case, i: int) -> float:
    return normed(case.number(i, "reward"), case.mates(i))


def sft(case: Case) -> Tensor:
    return token_average(case, lambda i: -case.sequence(i, "logp"))


def rft(case: Case) -> Tensor:
    kept = [i for i in case.indices if case.number(i, "reward") > 0]
    return -torch.cat([case.sequence(i, "logp") for i in kept]).sum() / case.tokens


def gae_advantage(case: Case, i: int, cost: Tensor | None = None) -> Tensor:
    """Sum over k of (gamma lambda)^k delta, gamma 0.9 and lambda 0.8, written out; cost [n] by token."""
    values = [*case.sequence(i, "values").tolist(), 0.0]
    n = len(values) - 1
    delta = [values[t + 1] * 0.9 - values[t] - (0.0 if cost is None else float(cost[t])) for t in range(n)]
    delta[-1] += case.number(i, "reward")
    result = [sum((0.9 * 0.8) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
    return torch.tensor(result, dtype=torch.float64)


def ppo(case: Case) -> Tensor:
    return token_average(case, lambda i: ppo_clip(case, i, gae_advantage(case, i)))


def grpo(case: Case) -> Tensor:
    return sequence_average(case, lambda i: ppo_clip(case, i, grpo_advantage(case, i)))


def dr_grpo(case: Case) -> Tensor:
    def per_token(i: int) -> Tensor:
        return ppo_clip(case, i, case.number(i, "reward") - statistics.mean(case.mates(i)))

    return dr_average(case, per_token, length=T)


def dapo(case: Case) -> Tensor:
    return token_average(case, lambda i: ppo_clip(case, i, grpo_advantage(case, i), high=0.28))


def reinforce(case: Case) -> Tensor:
    return token_average(case, lambda i: -case.number(i, "reward") * case.sequence(i, "logp"))


def reinforce_pp(case: Case) -> Tensor:
    rewards = [case.number(j, "reward") for j in case.indices]
    return token_average(case, lambda i: ppo_clip(case, i, normed(case.number(i, "reward"), rewards)))


def rloo(case: Case) -> Tensor:
    def per_token(i: int) -> Tensor:
        reward, mates = case.number(i, "reward"), case.mates(i)
        others = (sum(mates) - reward) / (len(mates) - 1) if len(mates) > 1 else reward
        return -(reward - others) * case.sequence(i, "logp")

    return token_average(case, per_token)


def maxrl(case: Case) -> Tensor:
    """The mean of ∇log π over the right rollouts less that over all, times the group's size."""

    def per_token(i: int) -> Tensor:
        mates = case.mates(i)
        right, logp = sum(mates), case.sequence(i, "logp")
        if right in (0, len(mates)):
            return 0 * logp
        return -(case.number(i, "reward") / right - 1 / len(mates)) * len(mates) * logp

    return token_average(case, per_token)


def cispo(case: Case) -> Tensor:
    def per_token(i: int) -> Tensor:
        logp = case.sequence(i, "logp")
        weight = torch.exp(logp - case.sequence(i, "old_logp")).clamp(1 - 0.3, 1 + 0.2).detach()
        return -weight * grpo_advantage(case, i) * logp

    return token_average(case, per_token)


def gspo(case: Case) -> Tensor:
    def objective(i: int) -> Tensor:
        s = torch.exp((case.sequence(i, "logp") - case.sequence(i, "old_logp")).mean())
        advantage = grpo_advantage(case, i)
        return torch.minimum(s * advantage, s.clamp(1 - 0.05, 1 + 0.1) * advantage)

    return -torch.stack([objective(i) for i in case.indices]).mean()


def joint(case: Case, offline_loss: Callable[[Tensor, float], Tensor]) -> Tensor:
    def per_token(i: int) -> Tensor:
        advantage = grpo_advantage(case, i)
        if case.number(i, "source") == 1:
            return offline_loss(torch.exp(case.sequence(i, "logp")), advantage)
        return ppo_clip(case, i, advantage)

    return token_average(case, per_token)


def srft(case: Case) -> Tensor:
    return joint(case, lambda prob, advantage: -prob * advantage)


def srft_entropy(case: Case) -> Tensor:
    """L_SFT(demo) + L_RL(demo) + L_RL(self), the three terms of SRFT; token mean over the whole batch."""

    def per_token(i: int) -> Tensor:
        logp = case.sequence(i, "logp")
        entropy = case.sequence(i, "entropy").detach().mean()
        if case.number(i, "source") == 1:
            return -logp.exp() * grpo_advantage(case, i) - 0.5 * torch.exp(-entropy) * logp
        return -0.1 * torch.exp(entropy) * logp if case.number(i, "reward") > 0 else logp

    return token_average(case, per_token)


def luffy(case: Case) -> Tensor:
    return joint(case, lambda prob, advantage: -(prob / (prob + 0.1)) * advantage)


def dpo(case: Case) -> Tensor:
    losses = []
    for chosen, rejected in pairs(case):
        h = [(case.sequence(i, "logp") - case.sequence(i, "ref_logp")).sum() for i in (chosen, rejected)]
        losses.append(-torch.nn.functional.logsigmoid(0.1 * (h[0] - h[1])))
    return torch.stack(losses).mean()


def pairs(case: Case) -> list[tuple[int, int]]:
    """(chosen, rejected) of each pair; pairs are (i, i + 6)."""
    found = []
    for i in range(len(GROUPS) // 2):
        better = case.number(i, "reward") > case.number(i + 6, "reward")
        found.append((i, i + 6) if better else (i + 6, i))
    return found


def hpt(case: Case) -> Tensor:
    """alpha Dr.GRPO without clipping on rollouts + 0.3 beta SFT on demonstrations, one normaliser."""

    def per_token(i: int) -> Tensor:
        weight, logp = case.number(i, "weight"), case.sequence(i, "logp")
        if case.number(i, "source") == 1:
            return -0.3 * weight * logp
        advantage = case.number(i, "reward") - statistics.mean(case.mates(i, online_only=True))
        return -weight * torch.exp(logp - case.sequence(i, "old_logp")) * advantage

    return dr_average(case, per_token, length=50)


PUBLISHED: dict[str, tuple[Callable[[Case], Tensor], dict[str, Any]]] = {
    "sft": (sft, {}),
    "rft": (rft, {}),
    "ppo": (ppo, {"gae_gamma": 0.9, "gae_lambda": 0.8}),
    "grpo": (grpo, {}),
    "dr_grpo": (dr_grpo, {}),
    "dapo": (dapo, {}),
    "reinforce": (reinforce, {}),
    "reinforce_pp": (reinforce_pp, {}),
    "rloo": (rloo, {}),
    "maxrl": (maxrl, {}),
    "cispo": (cispo, {"clip_low": 0.3, "clip_high": 0.2}),
    "gspo": (gspo, {"clip_low": 0.05, "clip_high": 0.1}),
    "srft": (srft, {}),
    "srft_entropy": (srft_entropy, {}),
    "luffy": (luffy, {}),
    "dpo": (dpo, {}),
    "hpt": (hpt, {"length": 50, "offline_coef": 0.3}),
}


def case_for(name: str, seed: int) -> Case:
    case = make_case(seed, offline=name in ("srft", "srft_entropy", "luffy", "hpt", "sft"))
    if name == "dpo":
        case.fields["pair"] = torch.arange(len(GROUPS)) % 6
        noise = torch.rand(len(GROUPS), generator=torch.Generator().manual_seed(seed))
        case.fields["reward"] = noise.double()
    if name == "hpt":
        case.fields["weight"] = torch.linspace(0.1, 1.2, len(GROUPS), dtype=torch.float64)
    return case


def difference(name: str, seed: int) -> tuple[float, float]:
    """(max |our gradient - the published loss's|, max |the latter|) over the tokens of a random batch."""
    published, options = PUBLISHED[name]
    case = case_for(name, seed)
    ours = case.gradient(algorithm(name, **options)(case.batch()).loss)
    theirs = case.gradient(published(case))
    mask = case.fields["mask"]
    assert (ours[~mask] == 0).all()
    return float((ours - theirs)[mask].abs().max()), float(theirs[mask].abs().max())
