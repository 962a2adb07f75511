"""The laws of QuestionLoader: epochs without repeats or gaps, sharding without effect, resume by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpt_mega.data.loader import QuestionLoader
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
