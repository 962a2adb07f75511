"""results.json from graded responses counted by hand, and the tables beside the published rows."""

from __future__ import annotations

import pytest

from hpt_mega.evaluation.benchmarks import Benchmark
from hpt_mega.evaluation.config import EvalConfig
from hpt_mega.evaluation.journal import GREEDY, SAMPLED, Graded
from hpt_mega.evaluation.published import COLUMNS, IN_DISTRIBUTION, PUBLISHED, column
from hpt_mega.evaluation.results import Result, results
from hpt_mega.evaluation.statistics import powers_of_two
from hpt_mega.evaluation.tables import comparison, html, latex, markdown
from hpt_mega.trajectory import Question

REWARDS = {"a/0": (1, 0, 1, 1), "a/1": (0, 0, 0, 0), "a/2": (0, 1, 0, 0)}
CATEGORIES = {"a/0": "algebra", "a/1": "algebra", "a/2": "number_theory & more"}


def found(name: str = "MATH-500", drop: int = 0) -> Result:
    questions = [Question(i, CATEGORIES[i], "", "7", "", (1,), ()) for i in REWARDS]
    graded = [
        Graded(name, SAMPLED, i, j, CATEGORIES[i], "7", "7" if j else "", reward, "", 10 + j, j > 0)
        for i, rewards in REWARDS.items()
        for j, reward in enumerate(rewards)
    ][drop:]
    graded += [Graded(name, GREEDY, i, 0, CATEGORIES[i], "7", "7", 1.0, "", 5, True) for i in REWARDS]
    cfg = EvalConfig(model="m <1>", benchmarks=[name])
    return results(cfg, [Benchmark(name, "f.json", "math", 4, questions, "<p>")], graded, None, 1.0)


def test_counts_become_averages_passes_and_categories() -> None:
    part = found()["benchmarks"]["MATH-500"][SAMPLED]
    assert part["avg@4"]["value"] == pytest.approx((3 / 4 + 0 + 1 / 4) / 3)
    assert part["pass@k"]["4"]["value"] == pytest.approx(2 / 3)
    assert part["pass@k"]["2"]["value"] == pytest.approx((1 + 0 + 1 / 2) / 3)
    assert part["categories"]["algebra"]["value"] == pytest.approx(3 / 8)
    assert part["without_answer"] == part["finished"] - 0.5 == 0.25
    assert part["mean_tokens"] == pytest.approx(11.5)


def test_a_missing_response_is_an_error_and_not_a_lower_score() -> None:
    with pytest.raises(ValueError, match="1 questions lack responses, for instance a/0"):
        found(drop=1)


def test_ours_stand_below_the_published_rows_in_the_column_of_the_benchmark() -> None:
    head, rows = comparison(found(), "qwen2_5_math_7b")
    assert head == ["", "MATH-500"]
    assert [row[0] for row in rows][-2:] == ["this run, greedy", "this run, sampled"]
    assert ["HPT (published)", "89.2"] in rows
    assert rows[-1][1].startswith("33.3 ± ")


def test_a_benchmark_without_published_figures_stands_alone() -> None:
    head, rows = comparison(found("mine"), "qwen2_5_math_7b")
    assert head == ["", "mine"]
    assert [row[0] for row in rows] == ["this run, greedy", "this run, sampled"]
    assert "arXiv" not in markdown(found("mine"), "qwen2_5_math_7b")


def test_two_benchmarks_that_one_column_would_hold_keep_their_names() -> None:
    both = found()
    both["benchmarks"] = {"math500": found("math500")["benchmarks"]["math500"], **both["benchmarks"]}
    head, rows = comparison(both, "")
    assert len(head) == len(rows[-1]) == 3 and head[-1] == "MATH-500"


def test_an_average_is_shown_where_all_six_suites_were_asked() -> None:
    whole = found()
    part = whole["benchmarks"]["MATH-500"]
    whole["benchmarks"] = {name: part for name in IN_DISTRIBUTION}
    head, rows = comparison(whole, "llama3_1_8b")
    assert head[-1] == "average" and rows[-1][-1] == "33.3"
    assert rows[4][0] == "HPT (published)" and rows[4][-1] == "18.2"


def test_the_pages_escape_what_they_show() -> None:
    assert "m &lt;1&gt;" in html(found(), "") and "&lt;p&gt;" in html(found(), "")
    assert r"this run, greedy & 100.0 $\pm$ 0.0 \\" in latex(found(), "qwen2_5_math_7b")
    assert "| number_theory & more | 1 |" in markdown(found(), "")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("MATH-500", "math500"),
        ("Olympiad-Bench", "olympiad"),
        ("AMC23", "amc23"),
        ("GPQA", "gpqa"),
        ("x", "x"),
    ],
)
def test_the_authors_folder_names_mean_the_published_columns(name: str, expected: str) -> None:
    assert column(name) == expected


def test_the_published_averages_follow_from_the_published_figures() -> None:
    # the tables' own column of averages over the six mathematical suites
    averages = (19.3, 44.5, 43.1, 46.5, 49.8, 44.2, 52.7)
    rows = PUBLISHED["qwen2_5_math_7b"].values()
    for row, average in zip(rows, averages, strict=True):
        assert sum(row[name] for name in IN_DISTRIBUTION) / 6 == pytest.approx(average, abs=0.06)
        assert row.keys() == set(COLUMNS)


def test_powers_of_two_end_at_the_number_of_samples() -> None:
    assert powers_of_two(1) == [1] and powers_of_two(32)[-2:] == [16, 32] and powers_of_two(6) == [1, 2, 4, 6]
