"""Micro-batches hold every trajectory once, within the budget, each token where a plain loop puts it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from hpt_mega.data.packing import MicroBatch, collate, plan_microbatches
from hpt_mega.trajectory import Source, Trajectory

LENGTHS = st.lists(st.integers(2, 40), max_size=25)
BUDGETS = st.integers(1, 120)


@given(lengths=LENGTHS, budget=BUDGETS, at_least=st.integers(0, 30))
def test_every_index_is_planned_exactly_once_in_at_least_as_many_groups(
    lengths: list[int], budget: int, at_least: int
) -> None:
    plan = plan_microbatches(lengths, budget, at_least)
    assert sorted(index for group in plan for index in group) == list(range(len(lengths)))
    assert len(plan) >= at_least
    freely = plan_microbatches(lengths, budget, 0)
    assert all(freely)
    assert len(plan) == max(at_least, len(freely))


@given(lengths=LENGTHS, budget=BUDGETS, at_least=st.integers(0, 30))
def test_a_group_keeps_the_budget_padding_included_unless_it_is_one_long_sequence(
    lengths: list[int], budget: int, at_least: int
) -> None:
    for group in plan_microbatches(lengths, budget, at_least):
        padded = max((lengths[i] for i in group), default=0) * len(group)
        assert padded <= budget or len(group) == 1


@given(lengths=LENGTHS, budget=BUDGETS)
def test_no_two_neighbours_would_fit_together(lengths: list[int], budget: int) -> None:
    plan = plan_microbatches(lengths, budget, 0)
    for first, second in pairwise(plan):
        longest = max(lengths[i] for i in first)
        assert longest * (len(first) + 1) > budget
        assert longest >= max(lengths[i] for i in second)


@given(
    sizes=st.lists(st.integers(2, 30), min_size=1, max_size=12), budget=BUDGETS, at_least=st.integers(0, 9)
)
def test_sequences_that_belong_together_share_a_group(sizes: list[int], budget: int, at_least: int) -> None:
    together = [index % max(1, len(sizes) // 2) for index in range(len(sizes))]
    plan = plan_microbatches(sizes, budget, at_least, together)
    assert sorted(index for group in plan for index in group) == list(range(len(sizes)))
    for group in plan:
        assert all(
            (other in group) == (together[other] in {together[i] for i in group})
            for other in range(len(sizes))
        )


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


@given(trajectories=TRAJECTORIES, multiple_of=st.integers(1, 4))
def test_collate_puts_every_token_where_a_plain_loop_puts_it(
    trajectories: list[Trajectory], multiple_of: int
) -> None:
    batch = collate(trajectories, [float(i) for i in range(len(trajectories))], multiple_of)
    width = batch.tokens_BS.shape[1]
    longest = max(len(t.prompt_tokens) + len(t.response_tokens) for t in trajectories)
    assert width % multiple_of == 0 and longest <= width < longest + multiple_of
    responses = max(len(t.response_tokens) for t in trajectories)
    predicted = []
    for row, t in enumerate(trajectories):
        whole = [*t.prompt_tokens, *t.response_tokens]
        assert batch.tokens_BS[row].tolist() == whole + [0] * (width - len(whole))
        for column in range(responses):
            inside = column < len(t.response_tokens)
            assert bool(batch.mask_BT[row, column]) == inside
            engine = t.rollout_logp[column] if inside and t.rollout_logp else 0.0
            assert float(batch.rollout_logp_BT[row, column]) == engine
            if inside:
                predicted.append((row, column, len(t.prompt_tokens) + column - 1, t.response_tokens[column]))
    found = zip(*(x.tolist() for x in indices(batch)), strict=True)
    assert list(found) == predicted
    assert batch.positions_1S.tolist() == [list(range(width))]
    assert batch.advantage_B is not None
    assert batch.advantage_B.tolist() == [float(i) for i in range(len(trajectories))]
    assert batch.reward_B.tolist() == [t.reward for t in trajectories]
    assert batch.weight_B.tolist() == [t.weight for t in trajectories]
    assert batch.group_B.tolist() == [t.group for t in trajectories]
    assert batch.source_B.tolist() == [int(t.source) for t in trajectories]


def indices(batch: MicroBatch) -> tuple[torch.Tensor, ...]:
    return batch.rows_N, batch.columns_N, batch.query_positions_N, batch.targets_N


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


def test_no_trajectory_at_all_gives_one_row_without_response_tokens() -> None:
    batch = collate([], [], multiple_of=3)
    assert batch.tokens_BS.shape == (1, 3)
    assert all(len(part) == 0 for part in indices(batch))
    assert not batch.mask_BT.any()
    assert float(batch.to_response_grid(torch.empty(0)).sum()) == 0
    assert batch.weight_B.tolist() == batch.reward_B.tolist() == [0.0]
