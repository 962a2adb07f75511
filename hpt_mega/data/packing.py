"""From trajectories to padded micro-batches of about equal token counts. Torch only, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpt_mega.trajectory import Source, Trajectory


@dataclass(frozen=True)
class MicroBatch:
    """B right-padded sequences of S tokens, and where their N response tokens are predicted.

    Response token n of the micro-batch is `targets_N[n]`; it is predicted from the hidden state at
    (`query_positions_N[n]`, `rows_N[n]`) and stands in column `columns_N[n]` of the [B, T] tensors.
    """

    tokens_BS: Tensor
    rows_N: Tensor
    columns_N: Tensor
    query_positions_N: Tensor
    targets_N: Tensor
    mask_BT: Tensor
    rollout_logp_BT: Tensor
    advantage_B: Tensor
    reward_B: Tensor
    weight_B: Tensor
    group_B: Tensor
    source_B: Tensor

    @property
    def positions_1S(self) -> Tensor:
        return torch.arange(self.tokens_BS.shape[1])[None]

    def to_response_grid(self, values_N: Tensor) -> Tensor:
        """Scatter one value a response token to [B, T], zero elsewhere; keeps the gradient."""
        grid_BT = values_N.new_zeros(self.mask_BT.shape)
        return grid_BT.index_put((self.rows_N, self.columns_N), values_N)


def plan_microbatches(
    lengths: Sequence[int], tokens_per_microbatch: int, at_least: int = 1
) -> list[list[int]]:
    """Group indices so that (longest length x count) stays within the budget; a longer one goes alone.

    Sequences of like length share a micro-batch, so little is padding. At least `at_least` groups are
    returned (splitting the largest, then adding empty ones): pipeline ranks must agree on their number.
    """
    plan: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        group = plan[-1] if plan else None
        if group and lengths[group[0]] * (len(group) + 1) <= tokens_per_microbatch:
            group.append(index)
        else:
            plan.append([index])
    while len(plan) < at_least:
        largest = max(plan, key=len, default=[])
        half = len(largest) // 2
        plan.append(largest[:half])
        del largest[:half]
    return plan


def collate(
    trajectories: Sequence[Trajectory], advantages: Sequence[float], multiple_of: int = 1
) -> MicroBatch:
    """One micro-batch of the trajectories; none at all gives one inert row, which keeps ranks in step."""
    lengths = [len(t) for t in trajectories] or [2]
    width = -(-max(lengths) // multiple_of) * multiple_of
    responses = max((len(t.response_tokens) for t in trajectories), default=1)
    count = max(1, len(trajectories))
    tokens_BS = torch.zeros(count, width, dtype=torch.long)
    mask_BT = torch.zeros(count, responses, dtype=torch.bool)
    rollout_logp_BT = torch.zeros(count, responses)
    for row, t in enumerate(trajectories):
        tokens_BS[row, : len(t)] = torch.tensor(t.prompt_tokens + t.response_tokens)
        mask_BT[row, : len(t.response_tokens)] = True
        if t.source is Source.ONLINE:
            rollout_logp_BT[row, : len(t.response_tokens)] = torch.tensor(t.rollout_logp)
    rows_N, columns_N = mask_BT.nonzero(as_tuple=True)
    prompt_lengths = torch.tensor([len(t.prompt_tokens) for t in trajectories] or [1])
    positions_N = prompt_lengths[rows_N] + columns_N
    inert = [0.0] if not trajectories else []
    return MicroBatch(
        tokens_BS=tokens_BS,
        rows_N=rows_N,
        columns_N=columns_N,
        query_positions_N=positions_N - 1,
        targets_N=tokens_BS[rows_N, positions_N],
        mask_BT=mask_BT,
        rollout_logp_BT=rollout_logp_BT,
        advantage_B=torch.tensor([*advantages, *inert], dtype=torch.float32),
        reward_B=torch.tensor([*(t.reward for t in trajectories), *inert], dtype=torch.float32),
        weight_B=torch.tensor([*(t.weight for t in trajectories), *inert], dtype=torch.float32),
        group_B=torch.tensor([*(t.group for t in trajectories), *map(int, inert)], dtype=torch.long),
        source_B=torch.tensor([*(int(t.source) for t in trajectories), *map(int, inert)], dtype=torch.long),
    )
