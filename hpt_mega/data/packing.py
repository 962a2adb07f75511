"""From trajectories to padded micro-batches of about equal token counts. Torch only, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpt_mega.trajectory import Source, Trajectory


@dataclass(frozen=True)
class MicroBatch:
    """B right-padded sequences of S tokens, and where their N response tokens are predicted.

    Response token n of the micro-batch is `targets_N[n]`; it is predicted from the hidden state at
    (`query_positions_N[n]`, `rows_N[n]`) and stands in column `columns_N[n]` of the [B, T] tensors.
    Those that may be None are there only where the trajectories carry them.
    """

    tokens_BS: Tensor
    rows_N: Tensor
    columns_N: Tensor
    query_positions_N: Tensor
    targets_N: Tensor
    mask_BT: Tensor
    rollout_logp_BT: Tensor
    reward_B: Tensor
    weight_B: Tensor
    group_B: Tensor
    source_B: Tensor
    advantage_B: Tensor | None = None
    question_tokens_B: Tensor | None = None
    old_logp_BT: Tensor | None = None
    ref_logp_BT: Tensor | None = None
    values_BT: Tensor | None = None
    pair_B: Tensor | None = None

    @property
    def positions_1S(self) -> Tensor:
        return torch.arange(self.tokens_BS.shape[1], device=self.tokens_BS.device)[None]

    def to(self, device: torch.device) -> MicroBatch:
        moved = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    def to_response_grid(self, values_N: Tensor) -> Tensor:
        """Scatter one value a response token to [B, T], zero elsewhere; keeps the gradient."""
        grid_BT = values_N.new_zeros(self.mask_BT.shape)
        return grid_BT.index_put((self.rows_N, self.columns_N), values_N)


def plan_microbatches(
    lengths: Sequence[int],
    tokens_per_microbatch: int,
    at_least: int = 1,
    together: Sequence[int] | None = None,
) -> list[list[int]]:
    """Group indices so that (longest length x count) stays within the budget; a longer one goes alone.

    Sequences of like length share a micro-batch, so little is padding. At least `at_least` groups are
    returned (splitting the largest, then adding empty ones): pipeline ranks must agree on their number.
    `together` [N] keeps indices with the same number in one group.
    """
    units: dict[int, list[int]] = {}
    for index in range(len(lengths)):
        units.setdefault(together[index] if together else index, []).append(index)
    longest = {key: max(lengths[i] for i in unit) for key, unit in units.items()}
    plan: list[list[list[int]]] = []
    width = 0
    for key in sorted(units, key=lambda key: (-longest[key], units[key][0])):
        count = sum(map(len, plan[-1])) if plan else 0
        if plan and width * (count + len(units[key])) <= tokens_per_microbatch:
            plan[-1].append(units[key])
        else:
            plan.append([units[key]])
            width = longest[key]
    while len(plan) < at_least:
        largest = max(plan, key=len, default=[])
        half = len(largest) // 2
        plan.append(largest[:half])
        del largest[:half]
    return [[index for unit in group for index in unit] for group in plan]


def collate(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float] | None = None,
    multiple_of: int = 1,
    question_tokens: Sequence[int] | None = None,
) -> MicroBatch:
    """One micro-batch of the trajectories; none at all gives one inert row, which keeps ranks in step.

    advantages, question_tokens: one number a trajectory. multiple_of: what the width is rounded up to.
    """
    width = -(-max([len(t) for t in trajectories], default=2) // multiple_of) * multiple_of
    responses = max((len(t.response_tokens) for t in trajectories), default=1)
    count = max(1, len(trajectories))
    tokens_BS = torch.zeros(count, width, dtype=torch.long)
    mask_BT = torch.zeros(count, responses, dtype=torch.bool)
    for row, t in enumerate(trajectories):
        tokens_BS[row, : len(t)] = torch.tensor(t.prompt_tokens + t.response_tokens)
        mask_BT[row, : len(t.response_tokens)] = True
    rows_N, columns_N = mask_BT.nonzero(as_tuple=True)
    prompt_lengths = torch.tensor([len(t.prompt_tokens) for t in trajectories] or [1])
    positions_N = prompt_lengths[rows_N] + columns_N

    def per_sequence(values: Sequence[float], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values if trajectories else [0], dtype=dtype)

    def grid(values: Sequence[Sequence[float]]) -> Tensor | None:
        return _grid(values, mask_BT.shape) if any(values) else None

    rollout_logp_BT = grid([t.rollout_logp if t.source is Source.ONLINE else () for t in trajectories])
    return MicroBatch(
        tokens_BS=tokens_BS,
        rows_N=rows_N,
        columns_N=columns_N,
        query_positions_N=positions_N - 1,
        targets_N=tokens_BS[rows_N, positions_N],
        mask_BT=mask_BT,
        rollout_logp_BT=torch.zeros(mask_BT.shape) if rollout_logp_BT is None else rollout_logp_BT,
        reward_B=per_sequence([t.reward for t in trajectories], torch.float32),
        weight_B=per_sequence([t.weight for t in trajectories], torch.float32),
        group_B=per_sequence([t.group for t in trajectories]),
        source_B=per_sequence([int(t.source) for t in trajectories]),
        advantage_B=None if advantages is None else per_sequence(advantages, torch.float32),
        question_tokens_B=None if question_tokens is None else per_sequence(question_tokens),
        old_logp_BT=grid([t.old_logp for t in trajectories]),
        ref_logp_BT=grid([t.ref_logp for t in trajectories]),
        values_BT=grid([t.values for t in trajectories]),
        pair_B=per_sequence([t.pair for t in trajectories])
        if any(t.pair >= 0 for t in trajectories)
        else None,
    )


def _grid(values: Sequence[Sequence[float]], shape: torch.Size) -> Tensor:
    """[B, T] from one number a response token; zero where there is none."""
    grid_BT = torch.zeros(shape)
    for row, numbers in enumerate(values):
        grid_BT[row, : len(numbers)] = torch.tensor(numbers)
    return grid_BT
