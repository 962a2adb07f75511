"""Reading a final answer and the verdicts of exact arithmetic, against answers worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpt_mega.rewards.math import final_answer, last_boxed, plain_number, quick_verdict


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"first \boxed{1}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{12} and then \boxed{34", None),
        ("48 + 27 = 75\n#### 75", "75"),
        ("The answer is 42.", "42"),
        ("The answer is: **42**", "42"),
        ("12 + 7 = 19", "19"),
        ("it costs 1,234.50 in all", "1,234.50"),
        ("I do not know", None),
    ],
)
def test_final_answer_is_the_last_box_else_the_marked_text_else_the_last_number(
    response: str, answer: str | None
) -> None:
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,234", Fraction(1234)),
        (r"1{,}234", Fraction(1234)),
        ("7.140", Fraction(714, 100)),
        ("-.5", Fraction(-1, 2)),
        ("−3", Fraction(-3)),
        (r"\$18", Fraction(18)),
        (r"5\text{ apples}", Fraction(5)),
        ("5 apples", Fraction(5)),
        ("x = 5", Fraction(5)),
        ("6/8", Fraction(3, 4)),
        (r"-\dfrac{6}{8}", Fraction(-3, 4)),
        ("12.", Fraction(12)),
        ("1/0", None),
        ("12,34", None),
        ("(1,234)", None),
        ("5 + 3", None),
        ("50%", None),
        ("1e999999999", None),
        ("", None),
    ],
)
def test_plain_numbers_are_read_exactly(text: str, value: Fraction | None) -> None:
    assert plain_number(text) == value


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_a_fraction_has_the_same_value_in_every_spelling(top: int, bottom: int) -> None:
    assert (
        plain_number(f"{top}/{bottom}")
        == plain_number(f"\\frac{{{top}}}{{{bottom}}}")
        == Fraction(top, bottom)
    )


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_a_boxed_integer_is_right_exactly_when_it_is_equal(given_value: int, answer: int) -> None:
    verdict = quick_verdict(f"\\boxed{{{given_value:,}}}", str(answer))
    assert verdict is not None and verdict.reward == float(given_value == answer)


@pytest.mark.parametrize("restated", ["12 + 7", "20-1", r"19 \times 1", "(12) + 7", "38/2 + 0", "1(19)"])
def test_restating_the_question_earns_nothing(restated: str) -> None:
    verdict = quick_verdict(f"\\boxed{{{restated}}}", "19")
    assert verdict is not None and verdict.reward == 0.0


@given(st.text(alphabet="{}\\boxed 7", max_size=60))
def test_a_box_is_returned_only_with_balanced_braces(text: str) -> None:
    content = last_boxed(text)
    if content:
        depth = 0
        for character in content:
            depth += (character == "{") - (character == "}")
            assert depth >= 0
        assert depth == 0


@given(st.text(max_size=300), st.text(max_size=40))
def test_no_text_raises(response: str, answer: str) -> None:
    quick_verdict(response, answer)
