"""What a response's final answer is, and the cases of right or wrong that plain arithmetic settles at once.

Everything here is linear in the text and safe on hostile input; symbolic comparison is in worker.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

TAIL_CHARACTERS = 20_000  # a final answer stands at the end; what comes before this is never looked at
ANSWER_CHARACTERS = 1_000  # a longer final answer is refused
NUMBER_CHARACTERS = 64  # a longer number is left to the symbolic comparison

_MARK = re.compile(r"####|\banswer\s+is\b:?|\banswer\s*:", re.IGNORECASE)
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_NUMBER = re.compile(rf"-?(?:{_DIGITS}(?:\.\d+)?|\.\d+)")
_PLAIN = re.compile(rf"([-+]?(?:{_DIGITS}(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{{1,2}})?)(?:/([-+]?\d+))?")
_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}")
_UNIT = re.compile(r"(?<=[\d.])\s*[A-Za-z][A-Za-z ]{0,40}$")
_NAMED = re.compile(r"^[A-Za-z]\s*=\s*")
_DECORATION = re.compile(r"\\(?:text|mathrm|textbf)\{[^{}]{0,80}\}|\\[,!;: ]|\\left|\\right|\\?\$|~")
_OPERATOR = re.compile(r"(?<=[\d)}\s])(?:[-+*×·÷/]|\\times|\\cdot|\\div)(?=[\d(\s\\-])")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?\s*(?:\\times|\\cdot|\*|×)\s*10\s*\^\s*\{?-?\d+\}?")


@dataclass(frozen=True)
class Verdict:
    """The reward of one response, 0.0 or 1.0, and the reason in a few words."""

    reward: float
    why: str


def last_boxed(text: str) -> str | None:
    r"""Content of the last \boxed{...}, braces balanced; "" where it never closes; None without one."""
    start = text.rfind(r"\boxed{")
    if start < 0:
        return None
    begin = start + len(r"\boxed{")
    depth = 1
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return ""


def final_answer(response: str) -> str | None:
    r"""The last \boxed{...}, else the text after the last '####' or 'answer is', else the last number."""
    text = response[-TAIL_CHARACTERS:]
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    marks = list(_MARK.finditer(text))
    if marks:
        line = text[marks[-1].end() :].strip().split("\n", 1)[0].strip(" .*:$")
        return line or None
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def plain_number(text: str) -> Fraction | None:
    r"""The exact value of an integer, decimal or fraction; None where the text is anything else.

    Dollar signs, thousands commas, \text{...}, a unit behind and "x =" before do not count.
    """
    text = _DECORATION.sub(" ", text.replace("−", "-").replace("{,}", ",")).strip().rstrip(".").strip()
    text = _NAMED.sub("", text)
    text = _UNIT.sub("", text).strip()
    if len(text) > NUMBER_CHARACTERS:
        return None
    if match := _FRACTION.fullmatch(text):
        top, bottom = Fraction(f"{match[1]}1") * int(match[2]), Fraction(match[3])
        return top / bottom if bottom else None
    match = _PLAIN.fullmatch(text.replace(" /", "/").replace("/ ", "/"))
    if match is None:
        return None
    top, bottom = Fraction(match[1].replace(",", "")), Fraction(match[2] or 1)
    return top / bottom if bottom else None


def quick_verdict(response: str, answer: str) -> Verdict | None:
    """The verdict where text and exact arithmetic decide it; None where symbolic comparison is needed.

    An expression that merely restates the question (answer 19, response 12 + 7) is wrong: it would
    otherwise be the cheapest way to a reward on arithmetic questions.
    """
    given = final_answer(response)
    if given is None:
        return Verdict(0.0, "no final answer")
    if len(given) > ANSWER_CHARACTERS:
        return Verdict(0.0, f"final answer of {len(given)} characters, at most {ANSWER_CHARACTERS} are read")
    if given == answer.strip():
        return Verdict(1.0, "same text")
    expected = plain_number(answer)
    if expected is None:
        return None
    value = plain_number(given)
    if value is None and last_boxed(response[-TAIL_CHARACTERS:]) is None:
        numbers = _NUMBER.findall(given)
        value = plain_number(numbers[-1]) if numbers else None
    if value is not None:
        return Verdict(1.0, "same number") if value == expected else Verdict(0.0, "another number")
    if _OPERATOR.search(given) and not _SCIENTIFIC.fullmatch(given):
        return Verdict(0.0, "an expression that is not worked out")
    return None
