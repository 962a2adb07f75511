"""The lab's arithmetic: right answers, true steps, sets that share nothing."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from hpt_mega.config import ConfigError
from hpt_mega.lab.exercises import KINDS, Exercise, Portion, draw, mixed, write
from hpt_mega.rewards.math import exact_verdict

NUMBER_OF_STEPS = {"chain": lambda size: size - 1, "sum": int, "difference": int, "product": int}


def samples() -> list[tuple[str, int, Exercise]]:
    random_ = random.Random(3)
    return [
        (kind, size, KINDS[kind](random_, size)) for kind in KINDS for size in (2, 3, 5) for _ in range(60)
    ]


def python_says(expression: str) -> int:
    assert re.fullmatch(r"[\d+*-]+", expression)
    return int(eval(re.sub(r"\b0+(?=\d)", "", expression)))


def test_answers_are_python_s_and_every_line_of_the_work_is_true() -> None:
    for _, _, exercise in samples():
        assert exercise.prompt.endswith("?")
        assert int(exercise.answer) == python_says(exercise.prompt[:-1])
        lines = exercise.verified.splitlines()[:-1]
        assert len(lines) == 2 * len(exercise.work)
        for line in (*exercise.work, *lines):
            left, right = line.split("=")
            assert python_says(left) == int(right), line


def test_the_work_of_a_sum_or_product_spells_the_answer_digit_by_digit() -> None:
    for kind, _, exercise in samples():
        values = [line.split("=")[1] for line in exercise.work]
        if kind in ("sum", "product"):
            assert values[-1] + "".join(value[-1] for value in values[-2::-1]) == exercise.answer
        elif kind == "difference":
            assert int("".join(reversed(values))) == int(exercise.answer)
        else:
            assert values[-1] == exercise.answer


def test_a_larger_size_takes_more_steps() -> None:
    for kind, size, exercise in samples():
        assert len(exercise.work) == NUMBER_OF_STEPS[kind](size)


def test_both_forms_of_a_demonstration_are_graded_right_and_a_wrong_digit_is_not() -> None:
    for _, _, exercise in samples():
        for text in (exercise.worked, exercise.verified, exercise.direct):
            assert exact_verdict(text, exercise.answer).reward == 1
        assert exact_verdict(exercise.worked.replace("{", "{1"), exercise.answer).reward == 0


def test_sets_share_no_question_and_are_the_same_for_the_same_seed() -> None:
    sets = [[Portion("sum", 2, 300), Portion("chain", 3, 200)], [Portion("sum", 2, 41), Portion("sum", 3, 7)]]
    first, second = draw(sets, 5), draw(sets, 5)
    assert first == second != draw(sets, 6)
    prompts = [exercise.prompt for drawn in first for exercise in drawn]
    assert len(prompts) == len(set(prompts)) == 548
    assert [exercise.task for exercise in first[1]].count("sum 3") == 7


def test_what_cannot_be_drawn_is_named() -> None:
    expected = "kind product of size 1 has 72 different questions and the sets of data take 73"
    with pytest.raises(ConfigError, match=expected):
        draw([[Portion("product", 1, 70)], [Portion("product", 1, 3)]], 1)


def test_the_share_of_demonstrations_that_show_their_work_is_the_portion_s(tmp_path: Path) -> None:
    portions = [Portion("sum", 2, 400, 0.25), Portion("sum", 3, 30)]
    (drawn,) = draw([portions], 2)
    write(tmp_path / "set.jsonl", drawn, mixed(portions, seed=4))
    rows = [json.loads(line) for line in (tmp_path / "set.jsonl").read_text().splitlines()]
    shown = [row["task"] for row in rows if "=" in row["demonstration"]]
    assert shown.count("sum 3") == 30
    assert 70 < shown.count("sum 2") < 130  # 100 expected, standard deviation 8.7
