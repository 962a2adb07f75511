"""load_questions with a byte-level tokenizer made here: splits, tokens, demonstrations and refusals."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hpt_mega.config import DataConfig, SourceConfig, TaskConfig
from hpt_mega.data.demonstrations import OPTIONS, WRITERS
from hpt_mega.data.questions import QuestionSet, check_complete, load_questions
from hpt_mega.rewards.math import quick_verdict
from tests.data.byte_tokenizer import byte_tokenizer

EASY = TaskConfig(
    "chain_sum", 1.0, "easy", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
)
HARD = TaskConfig(
    "chain_sum", 2.0, "hard", {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}
)
WORDS = TaskConfig("gsm_symbolic", 1.5, "words")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def config(
    *tasks: TaskConfig, train: int = 53, heldout: int = 31, prompt: int = 600, demo: int = 400
) -> DataConfig:
    return DataConfig(
        tasks=list(tasks),
        train_questions=train,
        heldout_questions=heldout,
        max_prompt_tokens=prompt,
        max_demonstration_tokens=demo,
        instruction="Box it.",
        seed=5,
    )


def test_no_question_text_is_met_twice_even_by_tasks_that_overlap(tokenizer: PreTrainedTokenizerFast) -> None:
    questions = load_questions(config(EASY, HARD, replace(HARD, label="hard again")), tokenizer)
    texts = [" ".join(question.prompt.lower().split()) for question in questions.train + questions.heldout]
    assert len(questions.train) == 53 and len(questions.heldout) == 31
    assert max(Counter(texts).values()) == 1
    ids = [question.id for question in questions.train + questions.heldout]
    assert len(set(ids)) == len(ids)


def test_the_mixture_follows_the_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    questions = load_questions(config(EASY, HARD, WORDS, train=90, heldout=45), tokenizer)
    assert Counter(q.task for q in questions.train) == {"easy": 20, "hard": 40, "words": 30}
    assert Counter(q.task for q in questions.heldout) == {"easy": 10, "hard": 20, "words": 15}


def test_the_same_config_gives_the_same_questions_and_another_seed_others(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    first = load_questions(config(HARD, WORDS), tokenizer)
    assert first == load_questions(config(HARD, WORDS), tokenizer)
    assert first.train != load_questions(replace(config(HARD, WORDS), seed=6), tokenizer).train


def test_tokens_spell_the_chat_prompt_and_the_demonstration_with_its_stop_token(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for question in load_questions(config(EASY, WORDS, train=11, heldout=3), tokenizer).train:
        assert tokenizer.decode(list(question.prompt_tokens)) == f"<s>Box it.<e><u>{question.prompt}<e><a>"
        assert tokenizer.decode(list(question.demonstration_tokens)) == f"{question.demonstration}<e>"


@pytest.mark.parametrize(
    "task",
    [
        EASY,
        WORDS,
        TaskConfig("basic_arithmetic", options={"min_terms": 2, "max_terms": 4, "max_digits": 2}),
        TaskConfig("decimal_chain_sum", options={"max_terms": 3, "max_digits": 2}),
        TaskConfig("products", options={"max_digits": 2}),
        TaskConfig("gcd", options={"max_value": 100}),
    ],
    ids=lambda task: task.name,
)
def test_every_demonstration_ends_in_a_box_that_earns_the_reward(
    task: TaskConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    for question in load_questions(config(task, train=37, heldout=7), tokenizer).train:
        last_line = question.demonstration.split("\n")[-1]
        assert last_line == f"\\boxed{{{question.answer}}}"
        verdict = quick_verdict(question.demonstration, question.answer)
        assert verdict is not None and verdict.reward == 1.0


def test_every_equality_in_an_arithmetic_demonstration_holds(tokenizer: PreTrainedTokenizerFast) -> None:
    task = TaskConfig("basic_arithmetic", options={"min_terms": 3, "max_terms": 5, "max_digits": 2})
    for question in load_questions(config(task, train=41, heldout=7), tokenizer).train:
        for line in question.demonstration.split("\n")[:-1]:
            sides = [eval(side) for side in line.split("=")]  # digits and + - * / of our own making
            assert sides == pytest.approx([sides[0]] * len(sides))


def test_a_task_too_small_for_the_wish_is_an_error_that_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"easy has \d+ distinct usable questions, 3007 are wanted"):
        load_questions(config(EASY, train=3000, heldout=7), tokenizer)


def test_long_prompts_are_dropped_with_a_count_and_refused_when_most_are(
    tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = load_questions(config(WORDS, train=11, heldout=3, prompt=400), tokenizer)
    assert max(len(question.prompt_tokens) for question in kept.train) <= 400
    assert "prompts above 400 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"longer than data.max_prompt_tokens=150"):
        load_questions(config(WORDS, train=11, heldout=3, prompt=150), tokenizer)


def test_long_demonstrations_are_left_out(tokenizer: PreTrainedTokenizerFast) -> None:
    kept = load_questions(config(WORDS, train=11, heldout=3, demo=200), tokenizer)
    assert max(len(question.demonstration_tokens) for question in kept.train + kept.heldout) <= 200


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([], "data.tasks is empty"),
        ([TaskConfig("telepathy")], "no task 'telepathy'"),
        ([TaskConfig("chain_sum", weight=0.0)], "weight of chain_sum is 0.0"),
        ([TaskConfig("chess")], "no task 'chess'"),
        ([TaskConfig("chain_summ")], "no task 'chain_summ'; did you mean chain_sum"),
    ],
)
def test_impossible_mixtures_are_refused(
    tasks: list[TaskConfig], message: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match=message):
        load_questions(config(*tasks), tokenizer)


def test_the_options_of_a_task_are_those_of_reasoning_gym() -> None:
    import reasoning_gym

    for task in WRITERS:
        known = {field.name for field in fields(reasoning_gym.factory.DATASETS[task][1])}
        assert known - {"seed", "size"} == set(OPTIONS[task])


def test_options_that_do_not_fit_together_are_named_with_their_task(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    with pytest.raises(ValueError, match=r"data\.tasks: options .*of chain_sum: max_terms must be >="):
        load_questions(config(replace(EASY, options={"min_terms": 3, "max_terms": 2})), tokenizer)


def test_an_empty_file_is_said_to_be_empty(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").touch()
    given = replace(config(EASY), train_file=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"none\.jsonl is empty; expected questions, 53 of them"):
        load_questions(given, tokenizer)


def test_a_task_without_demonstrations_is_refused_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no demonstrations are known for 'spell_backward'"):
        load_questions(config(TaskConfig("spell_backward")), tokenizer)


def test_a_file_takes_the_place_of_the_tasks_and_brings_rejected_responses(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    lines = [
        {"prompt": f"{i} + 1?", "answer": str(i + 1), "demonstration": f"{i + 1}", "rejected": f"{i}"}
        for i in (1, 2, 3, 3, 4)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in [{"prompt": "long " * 200}, *lines]))
    wanted = replace(config(EASY, train=4, heldout=7), train_file=str(path))
    questions = load_questions(wanted, tokenizer)
    assert sorted(question.prompt for question in questions.train) == [f"{i} + 1?" for i in (1, 2, 3, 4)]
    assert {question.task for question in questions.train} == {"pairs"}
    assert {question.task for question in questions.heldout} == {"easy"}
    third = next(question for question in questions.train if question.prompt == "3 + 1?")
    assert tokenizer.decode(third.rejected_tokens) == "3<e>"
    assert tokenizer.decode(third.demonstration_tokens) == "4<e>"
    with pytest.raises(
        ValueError, match=r"has 4 distinct usable questions, 5 are wanted; lower data\.train_q"
    ):
        load_questions(replace(wanted, train_questions=5), tokenizer)


def test_a_long_demonstration_of_a_file_is_cut_and_has_no_end(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "1 + 1?", "answer": "2", "demonstration": "1 + 1 = " + "2" * 99}))
    wanted = replace(config(EASY, train=1, heldout=3, demo=20), train_file=str(path))
    (only,) = load_questions(wanted, tokenizer).train
    assert tokenizer.decode(only.demonstration_tokens) == "1 + 1 = 222222222222"
    assert "cut 1 demonstrations to 20 tokens" in capsys.readouterr().out


def test_a_question_of_a_file_may_lack_demonstration_and_rejected(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"prompt": "1 + 1?", "answer": "2"}')
    questions = load_questions(replace(config(EASY, train=1, heldout=3), train_file=str(path)), tokenizer)
    (only,) = questions.train
    assert (only.demonstration_tokens, only.rejected_tokens) == ((), ())


def test_a_question_that_lacks_what_a_run_asks_of_it_ends_the_run_at_its_start(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def read(*rows: dict[str, str]) -> QuestionSet:
        path = tmp_path / "some.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows))
        parts = [SourceConfig(str(path), questions=len(rows))]
        return load_questions(replace(config(EASY, heldout=3), mixture=parts), tokenizer)

    whole = {"prompt": "a?", "answer": "1", "demonstration": "1"}
    check_complete(read(whole), graded=True, demonstrated=True)
    unanswered = read(whole, {"prompt": "b?", "demonstration": "2"})
    check_complete(unanswered, graded=False)
    check_complete(unanswered, graded=True, sampled=False, demonstrated=True)
    with pytest.raises(ValueError, match=r"1 of 2 training questions have no gold answer, .* 'some-1'"):
        check_complete(unanswered, graded=True)
    with pytest.raises(ValueError, match=r"2 of 2 held-out .* no gold .*data\.heldout_columns\.answer"):
        check_complete(replace(unanswered, heldout=[unanswered.train[1]] * 2), graded=True, sampled=False)
    bare = read(whole, {"prompt": "b?", "answer": "2"})
    check_complete(bare, graded=True)
    with pytest.raises(ValueError, match=r"1 of 2 training questions have no demonstration, .* 'some-1'"):
        check_complete(bare, graded=True, demonstrated=True)


def test_a_files_system_message_is_kept_dropped_or_replaced(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jsonl"
    chat = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1 + 1?"}]
    path.write_text(json.dumps({"prompt": chat, "answer": "2"}))
    wanted = replace(config(EASY, train=1, heldout=3), train_file=str(path))
    for instruction, keep, prompt in (
        ("", True, "<s>Think.<e><u>1 + 1?<e><a>"),
        ("", False, "<u>1 + 1?<e><a>"),
        ("Box it.", True, "<s>Box it.<e><u>1 + 1?<e><a>"),
    ):
        asked = replace(wanted, instruction=instruction, keep_system=keep)
        (question,) = load_questions(asked, tokenizer).train
        assert tokenizer.decode(question.prompt_tokens) == prompt


def test_a_mixture_of_files_keeps_its_parts_apart(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name, count in (("a", 5), ("b", 3)):
        lines = [json.dumps({"prompt": f"{name} {i}?", "answer": str(i)}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    mixture = [
        SourceConfig(str(tmp_path / "a.jsonl"), weight=2.0, questions=4),
        SourceConfig(str(tmp_path / "b.jsonl"), questions=3),
    ]
    loaded = load_questions(replace(config(EASY, heldout=3), mixture=mixture), tokenizer)
    assert [question.task for question in loaded.train] == ["a"] * 4 + ["b"] * 3
    assert (loaded.sizes, loaded.weights) == ([4, 3], [2.0, 1.0])
    assert loaded.train[4].prompt == "b 0?" and len(loaded.train) == 7
    assert [question.prompt for question in loaded.train[3:5]] == ["a 3?", "b 0?"]
    with pytest.raises(IndexError):
        loaded.train[7]
    mixture[1].questions = 4
    with pytest.raises(ValueError, match=r"4 are wanted; lower data\.mixture\.1\.questions"):
        load_questions(replace(config(EASY, heldout=3), mixture=mixture), tokenizer)
