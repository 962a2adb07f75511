"""Plans hold every sequence once, within the budget, and leave no rank with more work than it must have."""

from __future__ import annotations

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from hpt_mega.data.balancing import plan_microbatches, share_prompts
from hpt_mega.trajectory import Source, Trajectory

LENGTHS = st.lists(st.integers(2, 40), max_size=25)
BUDGETS = st.integers(1, 120)
QUADRATIC = st.sampled_from([0.0, 1e-3, 0.3])


@given(
    lengths=LENGTHS,
    budget=BUDGETS,
    ranks=st.integers(1, 4),
    multiple=st.integers(1, 3),
    quadratic=QUADRATIC,
)
def test_every_sequence_is_planned_once_and_ranks_have_equally_many_micro_batches(
    lengths: list[int], budget: int, ranks: int, multiple: int, quadratic: float
) -> None:
    plan = plan_microbatches(lengths, budget, ranks, quadratic=quadratic, count_multiple=multiple)
    assert sorted(index for rank in plan for part in rank for index in part) == list(range(len(lengths)))
    assert len(plan) == ranks
    (count,) = {len(rank) for rank in plan}
    assert count > 0 and count % multiple == 0


@given(lengths=LENGTHS, budget=BUDGETS, ranks=st.integers(1, 4), quadratic=QUADRATIC)
def test_a_micro_batch_keeps_the_budget_unless_it_is_one_long_sequence(
    lengths: list[int], budget: int, ranks: int, quadratic: float
) -> None:
    for rank in plan_microbatches(lengths, budget, ranks, quadratic=quadratic):
        for part in rank:
            assert sum(lengths[i] for i in part) <= budget or len(part) == 1


@given(lengths=LENGTHS, budget=BUDGETS, ranks=st.integers(1, 4), quadratic=QUADRATIC)
def test_there_are_no_more_micro_batches_than_half_full_ones_would_be(
    lengths: list[int], budget: int, ranks: int, quadratic: float
) -> None:
    (rank, *_) = plan_microbatches(lengths, budget, ranks, quadratic=quadratic)
    large = sum(length > budget / 2 for length in lengths)  # each needs its own
    half_full = math.ceil(2 * sum(min(length, budget) for length in lengths) / budget)
    assert len(rank) * ranks <= max(large, half_full) + ranks


@given(sizes=st.lists(st.integers(2, 30), min_size=1, max_size=12), budget=BUDGETS, ranks=st.integers(1, 3))
def test_sequences_that_belong_together_share_a_micro_batch(
    sizes: list[int], budget: int, ranks: int
) -> None:
    together = [index % max(1, len(sizes) // 2) for index in range(len(sizes))]
    plan = plan_microbatches(sizes, budget, ranks, together=together)
    for part in (part for rank in plan for part in rank):
        inside = {together[i] for i in part}
        assert part == [i for i in range(len(sizes)) if together[i] in inside]


def answers(prompts: list[int], size: int, *, paired: bool = False) -> list[Trajectory]:
    """A response of one to five tokens to each of the prompts, which have `size` tokens."""
    return [
        Trajectory(
            (prompt,) * size,
            (0,) * (1 + index % 5),
            group=prompt,
            source=Source.ONLINE,
            policy_version=0,
            rollout_logp=(),
            reward=0.0,
            pair=index // 2 if paired else -1,
        )
        for index, prompt in enumerate(prompts)
    ]


PROMPTS = st.lists(st.integers(0, 3), min_size=1, max_size=16)


@given(prompts=PROMPTS, size=st.integers(1, 6), most=st.integers(1, 40))
def test_responses_to_a_prompt_share_it_in_parts_of_limited_size(
    prompts: list[int], size: int, most: int
) -> None:
    trajectories = answers(prompts, size)
    lengths, together = share_prompts(trajectories, most)
    for part in set(together):
        members = [index for index, one in enumerate(together) if one == part]
        assert len({prompts[index] for index in members}) == 1
        tokens = sum(lengths[index] for index in members)
        assert tokens == size + sum(len(trajectories[index].response_tokens) for index in members)
        assert tokens <= most or len(members) == 1
    assert len(set(together)) == len(set(prompts)) or sum(lengths) > most


@given(prompts=PROMPTS, most=st.integers(1, 40))
def test_a_pair_is_not_split_even_where_its_prompts_differ(prompts: list[int], most: int) -> None:
    trajectories = answers(prompts, 3, paired=True)
    lengths, together = share_prompts(trajectories, most)
    assert together[: len(together) // 2 * 2 : 2] == together[1::2]
    stand = {(part, prompt) for part, prompt in zip(together, prompts, strict=True)}
    assert sum(lengths) == 3 * len(stand) + sum(len(t.response_tokens) for t in trajectories)


def test_ranks_differ_by_under_a_percent_in_work_where_attention_counts() -> None:
    generator = random.Random(4)
    lengths = [min(8192, max(50, int(generator.lognormvariate(6.8, 1.0)))) for _ in range(1024)]
    quadratic = 1e-4  # a sequence of 10,000 tokens spends as much on attention as on its matrices
    plan = plan_microbatches(lengths, 16384, ranks=8, quadratic=quadratic)
    work = [[sum(lengths[i] * (1 + quadratic * lengths[i]) for i in part) for part in rank] for rank in plan]
    assert max(map(sum, work)) < 1.01 * sum(map(sum, work)) / 8
    together = sum(max(column) for column in zip(*work, strict=True))  # ranks that wait at every micro-batch
    assert together < 1.05 * sum(map(sum, work)) / 8
