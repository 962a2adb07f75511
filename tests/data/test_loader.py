"""The laws of QuestionLoader: epochs without repeats or gaps, sharding without effect, resume by step."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpt_mega.data.loader import QuestionLoader
from hpt_mega.data.order import Order
from hpt_mega.trajectory import Question


def questions(count: int) -> list[Question]:
    return [Question(f"q{i}", "t", f"what is {i}?", str(i), "", (i,), (i,)) for i in range(count)]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(questions, questions_per_step, dp_size, seed)"""
    dp_size, per_rank = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    count = draw(st.integers(dp_size * per_rank, 67))
    return count, dp_size * per_rank, dp_size, draw(st.integers(0, 2**40))


@given(layouts(), st.integers(1, 4))
def test_an_epoch_over_all_ranks_serves_every_question_once(
    layout: tuple[int, int, int, int], epochs: int
) -> None:
    count, per_step, dp_size, seed = layout
    loaders = [QuestionLoader(questions(count), per_step, rank, dp_size, seed) for rank in range(dp_size)]
    served: list[int] = []
    step = 0
    while len(served) < epochs * count:
        for loader in loaders:
            served += loader.indices(step)
        step += 1
    for epoch in range(epochs):
        assert sorted(served[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(layouts(), st.integers(0, 1000))
def test_the_ranks_batches_joined_are_the_batch_of_one_rank(
    layout: tuple[int, int, int, int], step: int
) -> None:
    count, per_step, dp_size, seed = layout
    everything = questions(count)
    joined = [
        question
        for rank in range(dp_size)
        for question in QuestionLoader(everything, per_step, rank, dp_size, seed).next_batch(step)
    ]
    assert joined == QuestionLoader(everything, per_step, 0, 1, seed).next_batch(step)


@given(layouts(), st.lists(st.integers(0, 300), max_size=6), st.integers(0, 300))
def test_a_batch_depends_on_the_step_alone(
    layout: tuple[int, int, int, int], history: list[int], step: int
) -> None:
    count, per_step, dp_size, seed = layout
    used = QuestionLoader(questions(count), per_step, dp_size - 1, dp_size, seed)
    for earlier in history:
        used.next_batch(earlier)
    fresh = QuestionLoader(questions(count), per_step, dp_size - 1, dp_size, seed)
    assert used.next_batch(step) == fresh.next_batch(step)


def test_the_order_changes_with_the_seed_and_from_epoch_to_epoch() -> None:
    orders = {
        tuple(QuestionLoader(questions(29), 29, 0, 1, seed).indices(epoch))
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(orders) == 4


@pytest.mark.parametrize(
    ("per_step", "rank", "size", "message"),
    [
        (7, 0, 2, "expected a multiple of parallel.dp=2"),
        (0, 0, 1, "questions_per_step is 0"),
        (12, 0, 1, "there are 11 training questions"),
        (4, 2, 2, "dp_rank is 2, expected 0 to 1"),
    ],
)
def test_impossible_settings_are_refused(per_step: int, rank: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuestionLoader(questions(11), per_step, rank, size, seed=1)


def test_a_mixture_serves_its_parts_by_weight_each_in_epochs_of_its_own() -> None:
    sizes, weights = [31, 7, 50], [0.5, 0.3, 0.2]
    served = [Order(sizes, 3, weights)[position] for position in range(2000)]
    parts = [
        [i for i in served if i < 31],
        [i - 31 for i in served if 31 <= i < 38],
        [i for i in served if i > 37],
    ]
    assert [len(part) for part in parts] == [1000, 600, 400]  # exact in every thousand
    for part, size in zip(parts, sizes, strict=True):
        for epoch in range(len(part) // size):
            assert len(set(part[epoch * size : (epoch + 1) * size])) == size


def test_a_mixture_that_cannot_be_drawn_is_refused() -> None:
    for weights, message in (
        ([1.0], "for each of 2 parts"),
        ([1.0, 0.0], "above 0"),
        ([1.0, 1e-5], "no place"),
    ):
        with pytest.raises(ValueError, match=message):
            Order([4, 4], 1, weights)


def curriculum(keep: float, dp_size: int = 1) -> list[QuestionLoader]:
    return [
        QuestionLoader(questions(40), 8, rank, dp_size, seed=3, keep_solved=keep) for rank in range(dp_size)
    ]


def rates(indices: list[int]) -> list[float]:
    """Even questions are always solved."""
    return [1.0 if i % 2 == 0 else 0.5 for i in indices]


def test_a_curriculum_asks_solved_questions_at_the_kept_share_of_their_turns() -> None:
    (loader,) = curriculum(keep=0.25)
    served: list[int] = []
    for step in range(600):
        served += loader.indices(step)
        loader.observe(rates(loader.indices(step)))
    solved = sum(i % 2 == 0 for i in served) / len(served)
    assert solved == pytest.approx(0.25 / 1.25, abs=0.02)
    assert {i for i in served if i % 2} == set(range(1, 40, 2))


def test_a_question_that_is_no_longer_solved_is_asked_as_often_as_before() -> None:
    (loader,) = curriculum(keep=0.05)
    for step in range(20):
        loader.indices(step)
        loader.observe([1.0] * 8)
    for step in range(20, 800):
        loader.observe([0.0] * len(loader.indices(step)))
    served = [i for step in range(800, 1000) for i in loader.indices(step)]
    assert min(Counter(served).values()) >= 39  # 40 epochs


@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_curriculum_goes_on_from_its_state_and_is_the_same_on_all_ranks(at: int) -> None:
    whole, ranks, resumed = curriculum(0.3)[0], curriculum(0.3, dp_size=2), curriculum(0.3)[0]
    for step in range(12):
        if step == at:
            resumed.restore(json.loads(json.dumps(whole.state())))
        batch = whole.indices(step)
        assert [i for rank in ranks for i in rank.indices(step)] == batch
        if step >= at:
            assert resumed.indices(step) == batch
            resumed.observe(rates(batch))
        for loader in (whole, *ranks):
            loader.observe(rates(batch))
    with pytest.raises(ValueError, match="step 40 is asked for, the curriculum is at 12"):
        whole.indices(40)
    with pytest.raises(ValueError, match="had no curriculum; set"):
        whole.restore({})
