"""Questions with demonstrations, from reasoning-gym or files, as text and tokens, for training and held out.

How a demonstration is worked out is in demonstrations.py, in which order questions are served in loader.py.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from hpt_mega.config import DataConfig, SourceConfig, TaskConfig
from hpt_mega.data.demonstrations import WRITERS, demonstration
from hpt_mega.data.files import Message, read_records
from hpt_mega.data.order import shares
from hpt_mega.data.store import StoredQuestions, fingerprint, is_prepared
from hpt_mega.data.templates import check, conversation, render
from hpt_mega.suggestion import did_you_mean
from hpt_mega.trajectory import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DRAWS_PER_QUESTION = 30  # entries drawn at most for each question wanted, before a task counts as exhausted


@dataclass(frozen=True)
class QuestionSet:
    """Train and held-out questions; no text is in both, none is twice in either."""

    train: Sequence[Question]
    heldout: Sequence[Question]
    sizes: Sequence[int] = ()  # of the parts of a mixture, which follow each other in train
    weights: Sequence[float] | None = None


class Joined(Sequence[Question]):
    """Several sequences as one."""

    def __init__(self, parts: Sequence[Sequence[Question]]) -> None:
        self.parts = parts
        self._ends = [*accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Question: ...
    @overload
    def __getitem__(self, index: slice) -> list[Question]: ...
    def __getitem__(self, index: int | slice) -> Question | list[Question]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"question {index} of {len(self)}")
        part = bisect_right(self._ends, index)
        return self.parts[part][index - self._ends[part] + len(self.parts[part])]


def load_questions(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> QuestionSet:
    """The questions of the files, where files are named, and else of the mixture config.tasks.

    The same for the same config and tokenizer on every machine. Raises ValueError where there are none, the
    tokenizer has no chat template or stop token, a task or file cannot supply enough distinct questions, or
    more than half of a task's prompts are too long.
    """
    _check(config, tokenizer)
    generated_train, generated_heldout = _generate(config, tokenizer)
    train: Sequence[Question] = generated_train
    heldout: Sequence[Question] = generated_heldout
    if config.train_file:
        source = SourceConfig(config.train_file, questions=config.train_questions, columns=config.columns)
        train = _read(source, "data.train_questions", config, tokenizer)
    parts = [
        _read(part, f"data.mixture.{number}.questions", config, tokenizer)
        for number, part in enumerate(config.mixture)
    ]
    if config.heldout_file:
        columns, wanted = config.heldout_columns, config.heldout_questions
        source = SourceConfig(config.heldout_file, questions=wanted, columns=columns)
        heldout = _read(source, "data.heldout_questions", config, tokenizer)
    # Mixed once here, so that any prefix of the held-out set is a fair sample of the mixture.
    heldout = _mixed(heldout, config.seed)
    train = Joined(parts) if parts else _mixed(train, config.seed + 1)
    if overlap := _texts(train) & _texts(heldout):
        raise ValueError(f"{len(overlap)} questions are in train and held-out, for instance {min(overlap)!r}")
    weights = [part.weight for part in config.mixture]
    return QuestionSet(train, heldout, [len(part) for part in parts], weights or None)


def check_complete(
    questions: QuestionSet, *, graded: bool, sampled: bool = True, demonstrated: bool = False
) -> None:
    """Raise ValueError where a question lacks what a run asks of it, at its start and not days later.

    graded: rewards compare with gold answers, of all questions or, unless those to train on are sampled, of
    the held-out ones. demonstrated: the gate may train on the demonstration of any question.
    """
    asked = [("held-out", questions.heldout), *([("training", questions.train)] if sampled else [])]
    for name, some in asked if graded else ():
        if absent := [i for i, answer in enumerate(_answers(some)) if not answer.strip()]:
            column = "data.heldout_columns.answer" if name == "held-out" else "data.columns.answer"
            raise ValueError(
                f"{len(absent)} of {len(some)} {name} questions have no gold answer, for instance "
                f"{some[absent[0]].id!r}, and no response to them could be right; name the column of the "
                f"answers ({column}=solution, or that of the mixture's part), leave those questions out, or "
                "grade without gold answers (reward.kind)"
            )
    if demonstrated and (absent := [i for i, has in enumerate(_demonstrated(questions.train)) if not has]):
        raise ValueError(
            f"{len(absent)} of {len(questions.train)} training questions have no demonstration, for instance "
            f"{questions.train[absent[0]].id!r}, and the gate may send each of them to SFT; give them one, "
            "leave them out, or choose a gate that never uses demonstrations (switch, threshold=-1)"
        )


def _parts(questions: Sequence[Question]) -> Sequence[Sequence[Question]]:
    return questions.parts if isinstance(questions, Joined) else [questions]


def _answers(questions: Sequence[Question]) -> list[str]:
    return [
        answer
        for part in _parts(questions)
        for answer in (part.answers if isinstance(part, StoredQuestions) else [one.answer for one in part])
    ]


def _demonstrated(questions: Sequence[Question]) -> list[bool]:
    """Whether each has a demonstration."""
    return [
        bool(length)
        for part in _parts(questions)
        for length in (
            part.lengths[:, 1]
            if isinstance(part, StoredQuestions)
            else [len(one.demonstration_tokens) for one in part]
        )
    ]


def _generate(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Question], list[Question]]:
    """(train, held-out) questions of the tasks; none of a part that a file supplies."""
    weights = [task.weight for task in config.tasks]
    has_files = bool(config.train_file or config.mixture)
    train_share = shares(0 if has_files else config.train_questions, weights)
    heldout_share = shares(0 if config.heldout_file else config.heldout_questions, weights)
    train: list[Question] = []
    heldout: list[Question] = []
    seen: set[str] = set()
    for index, task in enumerate(config.tasks):
        wanted = train_share[index] + heldout_share[index]
        questions = _draw(task, index, wanted, config, tokenizer, seen)
        heldout += questions[: heldout_share[index]]
        train += questions[heldout_share[index] :]
    return train, heldout


def _mixed(questions: Sequence[Question], seed: int) -> Sequence[Question]:
    order = list(range(len(questions)))
    random.Random(seed).shuffle(order)
    if isinstance(questions, StoredQuestions):
        return questions.choose(np.array(order))
    return [questions[i] for i in order]


def _texts(questions: Sequence[Question]) -> set[str]:
    return {
        normalised(prompt)
        for part in _parts(questions)
        for prompt in (part.prompts if isinstance(part, StoredQuestions) else [one.prompt for one in part])
    }


def _stored(
    source: SourceConfig, key: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> StoredQuestions:
    """The first questions of a prepared folder whose prompts and responses are short enough."""
    folder, wanted = Path(source.file), source.questions
    stored = StoredQuestions(folder)
    marks = fingerprint(tokenizer, config.template, config.instruction, config.keep_system)
    if stored.manifest["fingerprint"] != marks:
        raise ValueError(
            f"{folder} was prepared with another tokenizer, template, instruction or keep_system than the "
            f"run's (template {stored.manifest['template']!r}, instruction "
            f"{stored.manifest['instruction']!r}); prepare it again with tools/prepare_data.py"
        )
    response = config.max_demonstration_tokens
    fits = (stored.lengths <= (config.max_prompt_tokens, response, response)).all(axis=1)
    if not fits.all():
        limits = f"{config.max_prompt_tokens} and {response}"
        print(f"data: {folder}: dropped {(~fits).sum()} questions above {limits} tokens")
    chosen = stored.choose(np.flatnonzero(fits)[:wanted])
    if len(chosen) < wanted:
        raise ValueError(f"{folder} has {len(chosen)} usable questions, {wanted} are wanted; lower {key}")
    return chosen


def _read(
    source: SourceConfig, key: str, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Sequence[Question]:
    """The first distinct questions of a file or dataset whose prompts are short enough.

    Their responses are cut as those of a prepared folder are. `key` says how many are wanted.
    """
    if is_prepared(source.file):
        return _stored(source, key, config, tokenizer)
    file, wanted = source.file, source.questions
    questions: dict[str, Question] = {}
    long_prompts = cut = 0
    limit = config.max_demonstration_tokens
    stem, number = Path(file).stem, -1
    for number, record in enumerate(read_records(file, source.columns)):
        if len(questions) == wanted:
            break
        texts = _Texts(
            record.prompt.strip(), record.answer, record.demonstration, record.rejected, record.earlier
        )
        question = _question(f"{stem}-{number}", record.task or stem, texts, config, tokenizer)
        if len(question.prompt_tokens) > config.max_prompt_tokens:
            long_prompts += 1
            continue
        cut += len(question.demonstration_tokens) > limit
        question = replace(
            question,
            demonstration_tokens=question.demonstration_tokens[:limit],
            rejected_tokens=question.rejected_tokens[:limit],
        )
        questions.setdefault(normalised(question.prompt), question)
    if long_prompts:
        print(f"data: {file}: dropped {long_prompts} prompts above {config.max_prompt_tokens} tokens")
    if cut:
        print(f"data: {file}: cut {cut} demonstrations to {limit} tokens")
    if number < 0:
        raise ValueError(f"{file} is empty; expected questions, {wanted} of them ({key})")
    if len(questions) < wanted:
        raise ValueError(
            f"{file} has {len(questions)} distinct usable questions, {wanted} are wanted; lower {key}"
        )
    return list(questions.values())


def normalised(text: str) -> str:
    """The text by which two questions count as the same: white space and letter case do not matter."""
    return " ".join(text.split()).casefold()


def _check(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    if not config.tasks and not ((config.train_file or config.mixture) and config.heldout_file):
        raise ValueError("data.tasks is empty; name at least one task, or choose a group such as data=demo")
    for task in config.tasks:
        _check_task(task)
    check(config.template, tokenizer)


def _check_task(task: TaskConfig) -> None:
    import reasoning_gym

    if not task.weight > 0:
        raise ValueError(
            f"data.tasks: weight of {task.label or task.name} is {task.weight}, expected above 0"
        )
    if task.name not in reasoning_gym.factory.DATASETS:
        near = did_you_mean(task.name, reasoning_gym.factory.DATASETS)
        raise ValueError(f"data.tasks: reasoning-gym has no task {task.name!r}{near}")
    if task.name not in WRITERS:
        known = ", ".join(sorted(WRITERS))
        raise ValueError(f"data.tasks: no demonstrations are known for {task.name!r}; known are {known}")


def _draw(
    task: TaskConfig,
    index: int,
    wanted: int,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    seen: set[str],
) -> list[Question]:
    """wanted questions of one task whose texts are not in seen; adds them to seen."""
    label = task.label or task.name
    questions: list[Question] = []
    drawn = long_prompts = unusable = 0
    for entry in _entries(task, config.seed * 1_000_003 + index * 10_000_019, wanted):
        if len(questions) == wanted:
            break
        text = normalised(entry["question"])
        if text in seen:
            continue
        drawn += 1
        try:
            solution = demonstration(task.name, entry)
        except ValueError:  # reasoning-gym's own solution does not end in its answer
            unusable += 1
            continue
        texts = _Texts(entry["question"].strip(), entry["answer"], solution)
        question = _question(f"{label}-{len(questions)}", label, texts, config, tokenizer)
        if len(question.prompt_tokens) > config.max_prompt_tokens:
            long_prompts += 1
        elif len(question.demonstration_tokens) > config.max_demonstration_tokens:
            unusable += 1
        else:
            seen.add(text)
            questions.append(question)
    if long_prompts:
        limit = config.max_prompt_tokens
        print(f"data: {label}: dropped {long_prompts} of {drawn} prompts above {limit} tokens")
    if 2 * long_prompts > drawn:
        raise ValueError(
            f"{long_prompts} of {drawn} prompts of {label} are longer than data.max_prompt_tokens="
            f"{config.max_prompt_tokens}; raise it or choose an easier task"
        )
    if len(questions) < wanted:
        raise ValueError(
            f"{label} has {len(questions)} distinct usable questions, {wanted} are wanted ({unusable} had a "
            f"wrong or too long demonstration); lower its weight or widen its options {dict(task.options)}"
        )
    return questions


def _entries(task: TaskConfig, seed: int, wanted: int) -> Iterator[dict[str, Any]]:
    import reasoning_gym

    size = DRAWS_PER_QUESTION * max(wanted, 1)
    try:
        dataset = reasoning_gym.create_dataset(task.name, seed=seed, size=size, **dict(task.options))
    except (AssertionError, TypeError, ValueError) as error:
        why = str(error) or "they do not fit together"
        raise ValueError(f"data.tasks: options {dict(task.options)} of {task.name}: {why}") from error
    for i in range(size):
        yield dataset[i]


@dataclass(frozen=True)
class _Texts:
    prompt: str
    answer: str
    demonstration: str
    rejected: str = ""
    earlier: tuple[Message, ...] = ()  # in the conversation


def _question(
    identifier: str, task: str, texts: _Texts, config: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> Question:
    messages = conversation(texts.earlier, texts.prompt, config.instruction, config.keep_system)
    text = render(config.template, messages, tokenizer)

    def response(words: str) -> tuple[int, ...]:
        tokens = tokenizer(words, add_special_tokens=False).input_ids if words else []
        return (*tokens, tokenizer.eos_token_id) if words else ()

    return Question(
        id=identifier,
        task=task,
        prompt=texts.prompt,
        answer=texts.answer,
        demonstration=texts.demonstration,
        prompt_tokens=tuple(tokenizer(text, add_special_tokens=False).input_ids),
        demonstration_tokens=response(texts.demonstration),
        rejected_tokens=response(texts.rejected),
    )
