"""Where benchmarks come from: names, files, generated tasks; their kinds, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hpt_mega.config import ColumnsConfig, ConfigError, conf_dir
from hpt_mega.evaluation.benchmarks import describe, load_benchmarks, problems
from hpt_mega.evaluation.config import EvalConfig
from hpt_mega.evaluation.published import COLUMNS
from tests.data.byte_tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def cfg(*benchmarks: str, **settings: Any) -> EvalConfig:
    return EvalConfig(model="m", benchmarks=list(benchmarks), **settings)


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(list(rows)))
    return str(path)


def test_a_file_named_test_is_named_by_its_folder_and_letters_make_it_multiple_choice(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    row = {"prompt": "Which?\n\nA. a\nB. b", "answer": "B", "source": "gpqa_diamond", "id": "0"}
    path = write(tmp_path / "GPQA" / "test.json", row, row | {"answer": "A"})
    (benchmark,) = load_benchmarks(cfg(path), tokenizer)
    assert (benchmark.name, benchmark.kind, benchmark.k) == ("GPQA", "choice", 1)
    path = write(tmp_path / "GPQA" / "hard.json", row, row | {"answer": "42"})
    (benchmark,) = load_benchmarks(cfg(path, k=5), tokenizer)
    assert (benchmark.name, benchmark.kind, benchmark.k) == ("hard", "math", 5)
    assert tokenizer.decode(benchmark.questions[0].prompt_tokens) == f"<u>{row['prompt']}<e><a>"


def test_columns_of_other_names_are_mapped_and_the_category_is_the_task(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path / "mine.json", {"problem": "1?", "solution": 1, "subject": "algebra"})
    columns = ColumnsConfig(prompt="problem", answer="solution", task="subject")
    (benchmark,) = load_benchmarks(cfg(path, columns=columns), tokenizer)
    assert (benchmark.questions[0].answer, benchmark.questions[0].task) == ("1", "algebra")
    with pytest.raises(ConfigError, match="no column solutions for answer; the row has problem, solution"):
        load_benchmarks(cfg(path, columns=ColumnsConfig(prompt="problem", answer="solutions")), tokenizer)


def test_questions_without_gold_answers_are_refused(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = write(tmp_path / "mine.json", {"prompt": "1?", "solution": "1"}, {"prompt": "2?"})
    with pytest.raises(ConfigError, match=r"2 questions .* have no answer, the first is number 1"):
        load_benchmarks(cfg(path), tokenizer)


def test_a_generated_task_is_the_same_for_a_seed(tokenizer: PreTrainedTokenizerFast) -> None:
    first, again, other = (
        load_benchmarks(cfg("gsm_symbolic", questions=3, seed=seed), tokenizer)[0] for seed in (1, 1, 2)
    )
    assert first == again != other
    assert first.k == 8 and first.kind == "math" and len(first.questions) == 3
    unknown = list(problems(cfg("reasoning_gym:chess", "reasoning_gym:gsm_symbolc")))
    assert unknown[0] == "benchmarks: reasoning-gym has no task 'chess'"
    assert unknown[1].endswith("has no task 'gsm_symbolc'; did you mean gsm_symbolic?")


def test_every_suite_of_the_paper_has_a_config_with_its_number_of_samples() -> None:
    configs = {name: describe(name, cfg(name))[1] for name in COLUMNS}
    assert {name for name, config in configs.items() if config.k == 32} == {"aime24", "aime25", "amc23"}
    assert all(config.source.startswith("hf:") for config in configs.values())
    assert {path.stem for path in (conf_dir() / "benchmark").glob("*.yaml")} >= set(COLUMNS)


def test_one_benchmark_twice_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    paths = [write(tmp_path / name / "test.json", {"prompt": "a", "answer": "1"}) for name in "ab"]
    assert list(problems(cfg(*paths))) == []
    assert list(problems(cfg(*paths, paths[0]))) == ["benchmarks: a is named twice; name each once"]
    (unknown,) = problems(cfg(paths[0], kind="foo"))
    assert unknown.startswith("benchmark a: kind is 'foo', expected auto, math, choice, exact")
