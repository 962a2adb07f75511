"""Runs of 13 words that a benchmark shares with training texts, against a comparison word by word."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hpt_mega.data.overlap import OverlapIndex, runs

words = st.lists(st.sampled_from(["a", "b", "C", "$x$", "7"]), min_size=3, max_size=30)


def shares_a_run(left: list[str], right: list[str], size: int) -> bool:
    plain = [[word.strip("$").lower() for word in text] for text in (left, right)]
    return any(
        plain[0][i : i + size] == plain[1][j : j + size]
        for i in range(len(left) - size + 1)
        for j in range(len(right) - size + 1)
    )


@given(words, words)
def test_two_texts_overlap_where_some_run_of_words_is_in_both(left: list[str], right: list[str]) -> None:
    shared = runs(" ".join(left), 3) & runs(" ".join(right), 3)
    assert bool(shared) == shares_a_run(left, right, 3)


def test_questions_are_listed_with_what_they_share_whatever_the_order_of_the_texts() -> None:
    long = "Every morning Aya goes for a walk of nine kilometres and stops at a coffee shop afterwards."
    questions = [
        long,
        "What is 1 + 1?",
        "An unrelated question of quite some words that nobody trains on today.",
    ]
    training = ["What is $1+1$?", f"Long ago. {long.upper()} Find it.", "What is 1 + 1? And 2?"]
    found = [OverlapIndex(questions) for _ in range(2)]
    found[0].add(training)
    found[1].add(reversed(training))
    assert list(found[0].overlapping) == [0, 1]
    assert found[0].overlapping == found[1].overlapping
    assert found[0].overlapping[1] == "what is 1 1"
