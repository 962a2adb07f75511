"""A packed micro-batch has each token where a plain loop puts it, and context ranks share it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from hpt_mega.data.packing import MicroBatch, collate, context_places
from hpt_mega.trajectory import Source, Trajectory


def trajectory(prompt: Sequence[int], response: Sequence[int], offline: bool, number: int) -> Trajectory:
    return Trajectory(
        prompt_tokens=tuple(prompt),
        response_tokens=tuple(response),
        group=number // 2,
        source=Source.OFFLINE if offline else Source.ONLINE,
        policy_version=0,
        rollout_logp=() if offline else tuple(-0.5 - token for token in response),
        reward=0.25 * number,
        weight=1.0 + number,
    )


TOKENS = st.lists(st.integers(1, 96), min_size=1, max_size=9)
TRAJECTORIES = st.lists(st.tuples(TOKENS, TOKENS, st.booleans()), min_size=1, max_size=6).map(
    lambda parts: [trajectory(*part, number) for number, part in enumerate(parts)]
)


@given(trajectories=TRAJECTORIES, segment=st.integers(1, 4), times=st.integers(1, 3))
def test_collate_puts_every_token_where_a_plain_loop_puts_it(
    trajectories: list[Trajectory], segment: int, times: int
) -> None:
    advantages = [float(i) for i in range(len(trajectories))]
    batch = collate(trajectories, advantages, segment_multiple=segment, row_multiple=segment * times)
    tokens, positions, bounds, predicted = [], [], [0], []
    for row, t in enumerate(trajectories):
        whole = [*t.prompt_tokens, *t.response_tokens]
        for column, token in enumerate(t.response_tokens):
            predicted.append((row, column, len(tokens) + len(t.prompt_tokens) + column - 1, token))
            engine = t.rollout_logp[column] if t.rollout_logp else 0.0
            assert float(batch.rollout_logp_BT[row, column]) == engine
        whole += [0] * (-len(whole) % segment)
        tokens += whole
        positions += range(len(whole))
        bounds.append(len(tokens))
    if rest := -len(tokens) % (segment * times):
        tokens += [0] * rest
        positions += range(rest)
        bounds.append(len(tokens))
    assert batch.tokens_1S.tolist() == [tokens]
    assert batch.positions_1S.tolist() == [positions]
    assert batch.boundaries_K.tolist() == bounds
    assert batch.longest == max(b - a for a, b in pairwise(bounds))
    assert list(zip(*(x.tolist() for x in indices(batch)), strict=True)) == predicted
    lengths = batch.mask_BT.sum(1).tolist()
    assert lengths == [len(t.response_tokens) for t in trajectories]
    assert batch.advantage_B is not None
    assert batch.advantage_B.tolist() == advantages
    assert batch.reward_B.tolist() == [t.reward for t in trajectories]
    assert batch.weight_B.tolist() == [t.weight for t in trajectories]
    assert batch.group_B.tolist() == [t.group for t in trajectories]
    assert batch.source_B.tolist() == [int(t.source) for t in trajectories]


@given(trajectories=TRAJECTORIES, prompts=st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_a_shared_prompt_stands_once_and_each_response_reads_as_behind_its_own(
    trajectories: list[Trajectory], prompts: list[int]
) -> None:
    asked = [
        replace(t, prompt_tokens=trajectories[prompt % len(trajectories)].prompt_tokens)
        for t, prompt in zip(trajectories, prompts, strict=False)
    ]
    batch = collate(asked, share_prompts=True)
    (tokens,), (positions,) = batch.tokens_1S.tolist(), batch.positions_1S.tolist()
    segments = [range(a, b) for a, b in pairwise(batch.boundaries_K.tolist())]
    once = sum(map(len, {t.prompt_tokens for t in asked})) + sum(len(t.response_tokens) for t in asked)
    assert len(tokens) == max(2, once)
    rows, columns, places, targets = (x.tolist() for x in indices(batch))
    assert list(zip(rows, columns, strict=True)) == [
        (row, column) for row, t in enumerate(asked) for column in range(len(t.response_tokens))
    ]
    for row, column, place, target in zip(rows, columns, places, targets, strict=True):
        t = asked[row]
        (number,) = (k for k, segment in enumerate(segments) if place in segment)
        prompt = batch.prompts[number]
        before = [] if prompt == number else segments[prompt]
        seen = [*before, *range(segments[number].start, place + 1)]
        assert tuple(tokens[at] for at in seen) == t.prompt_tokens + t.response_tokens[:column]
        assert [positions[at] for at in seen] == list(range(len(seen)))
        assert target == t.response_tokens[column]


def indices(batch: MicroBatch) -> tuple[torch.Tensor, ...]:
    return batch.rows_N, batch.columns_N, batch.places_N, batch.targets_N


@given(trajectories=TRAJECTORIES)
def test_the_response_grid_is_the_inverse_of_the_flat_response_tokens_and_keeps_the_gradient(
    trajectories: list[Trajectory],
) -> None:
    batch = collate(trajectories, [0.0] * len(trajectories))
    values = torch.arange(1.0, len(batch.targets_N) + 1, requires_grad=True)
    grid = batch.to_response_grid(values)
    assert torch.equal(grid[batch.mask_BT], values)
    assert float(grid[~batch.mask_BT].abs().sum()) == 0
    (gradient,) = torch.autograd.grad((grid * grid).sum(), values)
    assert torch.equal(gradient, 2 * values)


def test_no_trajectory_at_all_gives_a_row_without_response_tokens() -> None:
    batch = collate([], [], row_multiple=3)
    assert batch.tokens_1S.shape == (1, 3)
    assert batch.boundaries_K.tolist() == [0, 3]
    assert all(len(part) == 0 for part in indices(batch))
    assert not batch.mask_BT.any()
    assert float(batch.to_response_grid(torch.empty(0)).sum()) == 0
    assert batch.weight_B.tolist() == batch.reward_B.tolist() == [0.0]


@given(chunks=st.lists(st.integers(1, 5), min_size=1, max_size=5), size=st.integers(1, 4))
def test_context_ranks_share_each_segment_in_mirrored_chunks(chunks: list[int], size: int) -> None:
    bounds = [0, *accumulate(2 * size * chunk for chunk in chunks)]
    places = [context_places(bounds, rank, size).tolist() for rank in range(size)]
    assert sorted(place for own in places for place in own) == list(range(bounds[-1]))
    for start, end in pairwise(bounds):
        work = [sum(place - start + 1 for place in own if start <= place < end) for own in places]
        assert len(set(work)) == 1  # the causal mask leaves each rank as many pairs
