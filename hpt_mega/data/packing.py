"""From trajectories to packed micro-batches: sequences end to end in one row. Torch only, no model.

Which sequences share a micro-batch is balancing.py's business.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from hpt_mega.trajectory import Source, Trajectory


@dataclass(frozen=True)
class MicroBatch:
    """B sequences laid end to end in a row of S tokens, and where their N response tokens are predicted.

    Segment k of the row is [boundaries_K[k], boundaries_K[k + 1]): a sequence with the padding that context
    parallelism asks for, at last the padding that rounds the row. No token sees another segment, and
    positions count from each segment's start. But responses may share a prompt: it is a segment then, and so
    is each of them, which sees segment `prompts[k]` before itself and counts on from its end; elsewhere
    `prompts[k]` is k. Response token n is `targets_N[n]`; it is predicted from the hidden state at
    `places_N[n]` of the row and stands at (`rows_N[n]`, `columns_N[n]`) of the [B, T] tensors. Those that may
    be None are there only where the trajectories carry them.
    """

    tokens_1S: Tensor
    positions_1S: Tensor
    boundaries_K: Tensor  # int32, one more than there are segments
    prompts: list[int]  # one a segment; read on the host, where a tensor would make a GPU wait
    longest: int  # segment
    rows_N: Tensor
    columns_N: Tensor
    places_N: Tensor
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

    def to(self, device: torch.device) -> MicroBatch:
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)

    def to_response_grid(self, values_N: Tensor) -> Tensor:
        """Scatter one value a response token to [B, T], zero elsewhere; keeps the gradient."""
        grid_BT = values_N.new_zeros(self.mask_BT.shape)
        return grid_BT.index_put((self.rows_N, self.columns_N), values_N)


def context_places(bounds: Sequence[int], rank: int, size: int) -> Tensor:
    """[S / size] places of the packed row that context-parallel rank `rank` of `size` computes, in order.

    Each segment [bounds[k], bounds[k + 1]) is cut into 2 * size chunks; a rank has chunk `rank` and, for
    equal work under the causal mask, chunk 2 * size - 1 - rank (Megatron's and Transformer Engine's cut).
    """
    places = []
    for start, end in pairwise(bounds):
        chunk = (end - start) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            places.append(torch.arange(start + number * chunk, start + (number + 1) * chunk))
    return torch.cat(places)


def collate(
    trajectories: Sequence[Trajectory],
    advantages: Sequence[float] | None = None,
    question_tokens: Sequence[int] | None = None,
    *,
    segment_multiple: int = 1,
    row_multiple: int = 1,
    share_prompts: bool = False,
) -> MicroBatch:
    """One micro-batch of the trajectories; none at all gives an inert one, which keeps ranks in step.

    advantages, question_tokens: one number a trajectory. segment_multiple, row_multiple: what the lengths of
    the segments and of the whole row are rounded up to; the second is a multiple of the first. share_prompts:
    whether the prompt of several trajectories stands in the row once, which not every attention can read.
    """
    segments, responses_at = _segments(trajectories, share_prompts)
    lengths = [round_up(len(segment.tokens), segment_multiple) for segment in segments]
    width = round_up(max(sum(lengths), 2), row_multiple)
    if width > sum(lengths):
        segments.append(_Segment((), len(segments)))
        lengths.append(width - sum(lengths))
    boundaries = [0, *accumulate(lengths)]
    tokens_S = torch.zeros(width, dtype=torch.long)
    for start, segment in zip(boundaries, segments, strict=False):
        tokens_S[start : start + len(segment.tokens)] = torch.tensor(segment.tokens, dtype=torch.long)
    responses = max((len(t.response_tokens) for t in trajectories), default=1)
    mask_BT = torch.zeros(max(1, len(trajectories)), responses, dtype=torch.bool)
    for row, t in enumerate(trajectories):
        mask_BT[row, : len(t.response_tokens)] = True
    rows_N, columns_N = mask_BT.nonzero(as_tuple=True)
    begins_B = torch.tensor([boundaries[number] + offset for number, offset in responses_at] or [1])
    prompt_ends_B = torch.tensor(
        [
            boundaries[segments[number].prompt] + len(t.prompt_tokens)
            for (number, _), t in zip(responses_at, trajectories, strict=True)
        ]
        or [1]
    )
    responses_N = begins_B[rows_N] + columns_N

    def per_sequence(values: Sequence[float], dtype: torch.dtype = torch.long) -> Tensor:
        return torch.tensor(values if trajectories else [0], dtype=dtype)

    def grid(values: Sequence[Sequence[float]]) -> Tensor | None:
        return _grid(values, mask_BT.shape) if any(values) else None

    rollout_logp_BT = grid([t.rollout_logp if t.source is Source.ONLINE else () for t in trajectories])
    return MicroBatch(
        tokens_1S=tokens_S[None],
        positions_1S=torch.cat(
            [
                torch.arange(segment.position, segment.position + length)
                for segment, length in zip(segments, lengths, strict=True)
            ]
        )[None],
        boundaries_K=torch.tensor(boundaries, dtype=torch.int32),
        prompts=[segment.prompt for segment in segments],
        longest=max(lengths),
        rows_N=rows_N,
        columns_N=columns_N,
        places_N=torch.where(columns_N == 0, prompt_ends_B[rows_N], responses_N) - 1,
        targets_N=tokens_S[responses_N],
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


@dataclass(frozen=True)
class _Segment:
    tokens: tuple[int, ...]
    prompt: int  # as in MicroBatch.prompts
    position: int = 0  # of its first token


def _segments(
    trajectories: Sequence[Trajectory], share_prompts: bool
) -> tuple[list[_Segment], list[tuple[int, int]]]:
    """The segments; and of each trajectory, in which of them its response is and where in it that begins."""
    users = Counter(t.prompt_tokens for t in trajectories if share_prompts)
    segments: list[_Segment] = []
    responses_at = []
    standing: dict[tuple[int, ...], int] = {}
    for t in trajectories:
        prompt = t.prompt_tokens
        if users[prompt] < 2:
            responses_at.append((len(segments), len(prompt)))
            segments.append(_Segment(prompt + t.response_tokens, len(segments)))
            continue
        if prompt not in standing:
            standing[prompt] = len(segments)
            segments.append(_Segment(prompt, len(segments)))
        responses_at.append((len(segments), 0))
        segments.append(_Segment(t.response_tokens, standing[prompt], len(prompt)))
    return segments, responses_at


def _grid(values: Sequence[Sequence[float]], shape: torch.Size) -> Tensor:
    """[B, T] from one number a response token; zero where there is none."""
    grid_BT = torch.zeros(shape)
    for row, numbers in enumerate(values):
        grid_BT[row, : len(numbers)] = torch.tensor(numbers)
    return grid_BT


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
