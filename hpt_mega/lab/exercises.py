r"""Arithmetic with worked solutions, of rising difficulty: the lab's questions, split without overlap.

A solution is one line a step and ends in \boxed{answer}; models that read it are made in models.py.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpt_mega.config import ConfigError
from hpt_mega.files import write_atomically

DRAWS_PER_EXERCISE = 50  # tried at most for each one wanted, before a kind counts as exhausted


@dataclass(frozen=True)
class Exercise:
    """A question with its answer and the lines of its solution."""

    prompt: str
    answer: str
    work: tuple[str, ...]
    task: str = ""

    @property
    def worked(self) -> str:
        return "\n".join((*self.work, self.direct))

    @property
    def verified(self) -> str:
        """As a teacher of another school writes it: every line is checked by the next one."""
        return "\n".join((*(part for line in self.work for part in (line, _check(line))), self.direct))

    @property
    def direct(self) -> str:
        return f"\\boxed{{{self.answer}}}"


@dataclass
class Portion:
    """How many exercises of a kind and size a set holds."""

    kind: str
    size: int  # terms of a chain, digits of a sum, difference or product
    count: int
    worked: float = 1.0  # share of them whose demonstration shows the work; the others only state the answer

    @property
    def task(self) -> str:
        return f"{self.kind} {self.size}"


def chain(random_: random.Random, terms: int) -> Exercise:
    """The sum of one-digit numbers, from left to right."""
    numbers = [random_.randint(1, 9) for _ in range(terms)]
    total, lines = numbers[0], []
    for number in numbers[1:]:
        lines.append(f"{total}+{number}={total + number}")
        total += number
    return Exercise("+".join(map(str, numbers)) + "?", str(total), tuple(lines))


def column_sum(random_: random.Random, digits: int) -> Exercise:
    """The sum of two numbers, column by column from the right, the carry as a third term."""
    left, right = _number(random_, digits), _number(random_, digits)
    lines, carry = [], 0
    for a, b in _columns(left, right):
        value = a + b + carry
        lines.append(f"{a}+{b}{f'+{carry}' if carry else ''}={value}")
        carry = value // 10
    return Exercise(f"{left}+{right}?", str(left + right), tuple(lines))


def difference(random_: random.Random, digits: int) -> Exercise:
    """The difference of two numbers, not below 0, column by column from the right, with borrowing."""
    right, left = sorted((_number(random_, digits), _number(random_, digits)))
    lines, borrow = [], 0
    for a, b in _columns(left, right):
        lent = 10 if a - b - borrow < 0 else 0
        lines.append(f"{a + lent}-{b}{f'-{borrow}' if borrow else ''}={a + lent - b - borrow}")
        borrow = lent // 10
    return Exercise(f"{left}-{right}?", str(left - right), tuple(lines))


def product(random_: random.Random, digits: int) -> Exercise:
    """A number times a digit, from the right, the carry added."""
    left, right = _number(random_, digits), random_.randint(2, 9)
    lines, carry = [], 0
    for character in reversed(str(left)):
        value = int(character) * right + carry
        lines.append(f"{character}*{right}{f'+{carry}' if carry else ''}={value}")
        carry = value // 10
    return Exercise(f"{left}*{right}?", str(left * right), tuple(lines))


def _check(line: str) -> str:
    """What is left of a sum without its last term, or the product the other way round."""
    left, value = line.split("=")
    _, plus, last = left.rpartition("+")
    if plus:
        return f"{value}-{last}={int(value) - int(last)}"
    if "*" in left:
        return f"{left.split('*')[1]}*{left.split('*')[0]}={value}"
    return f"{value}+{left.partition('-')[2].replace('-', '+')}={left.partition('-')[0]}"


KINDS: dict[str, Callable[[random.Random, int], Exercise]] = {
    "chain": chain,
    "sum": column_sum,
    "difference": difference,
    "product": product,
}


def _number(random_: random.Random, digits: int) -> int:
    """A number of so many digits, the first of which is not 0."""
    return random_.randint(10 ** (digits - 1), 10**digits - 1)


def _columns(left: int, right: int) -> list[tuple[int, int]]:
    """Digits of equal place, ones first."""
    width = max(len(str(left)), len(str(right)))
    pairs = zip(reversed(f"{left:0{width}}"), reversed(f"{right:0{width}}"), strict=True)
    return [(int(a), int(b)) for a, b in pairs]


def draw(sets: Sequence[Sequence[Portion]], seed: int) -> list[list[Exercise]]:
    """The exercises of each set, in a random order; none is in two sets, none twice in one.

    Sets that ask for the same kind and size share one stream of distinct questions. Raises ConfigError where
    a kind cannot supply as many as are wanted.
    """
    wanted: dict[tuple[str, int], int] = {}
    for portion in (portion for portions in sets for portion in portions):
        wanted[portion.kind, portion.size] = wanted.get((portion.kind, portion.size), 0) + portion.count
    streams = {key: iter(_distinct(*key, count, seed)) for key, count in sorted(wanted.items())}
    drawn = []
    for number, portions in enumerate(sets):
        chosen = [
            next(streams[portion.kind, portion.size]) for portion in portions for _ in range(portion.count)
        ]
        random.Random(f"{seed} {number}").shuffle(chosen)
        drawn.append(chosen)
    return drawn


def _distinct(kind: str, size: int, count: int, seed: int) -> list[Exercise]:
    random_ = random.Random(f"{seed} {kind} {size}")  # a text, whose hash is the same in every process
    found: dict[str, Exercise] = {}
    for _ in range(DRAWS_PER_EXERCISE * count):
        if len(found) == count:
            break
        exercise = KINDS[kind](random_, size)
        named = Exercise(exercise.prompt, exercise.answer, exercise.work, f"{kind} {size}")
        found.setdefault(exercise.prompt, named)
    if len(found) < count:
        raise ConfigError(
            f"lab: kind {kind} of size {size} has {len(found)} different questions and the sets of data take "
            f"{count}; lower their counts"
        )
    return list(found.values())


def write(path: Path, exercises: Iterable[Exercise], demonstrate: Callable[[Exercise], str]) -> None:
    """A file for data.train_file or data.heldout_file."""
    rows = (
        {
            "prompt": exercise.prompt,
            "answer": exercise.answer,
            "demonstration": demonstrate(exercise),
            "task": exercise.task,
        }
        for exercise in exercises
    )
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))


def mixed(portions: Sequence[Portion], seed: int) -> Callable[[Exercise], str]:
    """Of each task the portion's share `worked` of demonstrations shows the work."""
    random_ = random.Random(seed)
    shares = {portion.task: portion.worked for portion in portions}
    return lambda exercise: exercise.worked if random_.random() < shares[exercise.task] else exercise.direct
