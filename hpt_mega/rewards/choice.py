r"""Verdicts on multiple-choice answers: which letter a response settles on.

Letters are A to J, and digits 1 to 9 where the gold answer is one (some ARC questions).
"""

from __future__ import annotations

import re

from hpt_mega.rewards.math import TAIL_CHARACTERS, last_boxed
from hpt_mega.rewards.verdict import Verdict

_WRAPPING = re.compile(
    r"\\(?:text|textbf|mathrm|mathbf|mathit|boxed|textit)\s*\{|[{}$*_`]|\\[,;! ]|\\left|\\right"
)
_OPTION = r"(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s*(?:is\s*)?:?\s*)?"


def _patterns(letters: str) -> tuple[re.Pattern[str], ...]:
    letter = rf"\(?\s*([{letters}])\s*(?:\)|(?![A-Za-z0-9'’+^=]))"
    boxed = re.compile(rf"\s*{_OPTION}{letter}\s*(?:[.:),-].*|)\s*", re.IGNORECASE | re.DOTALL)
    stated = re.compile(
        rf"(?i:\b(?:answer|option|choice)\**\s*(?:is|would\s+be|:|=)+\s*:?\s*(?:(?:the\s+)?(?:option|choice|letter)\s*)?)"
        rf"{letter}|(?i:\b(?:option|choice)\s+){letter}(?i:\s+is\s+(?:the\s+)?(?:correct|right|best))"
    )
    alone = re.compile(rf"\s*{letter}\s*[.:)]?\s*")
    another = re.compile(
        rf"\s*\)?\s*(?:[,;/&]|(?:and|or)\b)\s*(?:(?:and|or)\s)?\s*\(?\s*([{letters}])\s*\)?\s*"
        r"(?:[,;./&]|(?:and|or)\b|$)"
    )
    return boxed, stated, alone, another


_LETTERS = _patterns("A-J")
_DIGITS = _patterns("1-9")


def chosen(response: str, digits: bool = False) -> str | None:
    r"""The letter of the last \boxed{...}, else of the last 'answer is (B)', else one alone at the end.

    None where the response settles on no letter, or names two of them as the answer; a box with anything else
    in it counts as no letter.
    """
    boxed, stated, alone, another = _DIGITS if digits else _LETTERS
    text = response[-TAIL_CHARACTERS:]
    box = last_boxed(text)
    if box is not None:
        match = boxed.fullmatch(" ".join(_WRAPPING.sub("", box).split()))
        return None if match is None or another.match(match.string, match.end(1)) else match[1].upper()
    text = re.sub(r"[^\S\n]+", " ", re.sub(r"\n\s*", "\n", _WRAPPING.sub("", text))).strip()
    found = list(stated.finditer(text))
    if found:
        return None if another.match(text, found[-1].end()) else str(found[-1][1] or found[-1][2]).upper()
    for line in (text.rsplit("\n", 1)[-1], text.split("\n", 1)[0]):
        if match := alone.fullmatch(line):
            return match[1].upper()
    match = re.match(rf"\(?([{'1-9' if digits else 'A-J'}])[.):]\s", text)  # "B. because ..."
    return match[1] if match else None


def choice_verdict(response: str, answer: str) -> Verdict:
    """Right where the letter chosen is the gold one; a gold answer that is no letter earns nothing."""
    digits = re.search(r"[1-9]", answer) is not None and re.search("[A-J]", answer) is None
    gold = chosen(rf"\boxed{{{answer.strip()}}}", digits)
    letter = chosen(response, digits)
    if gold is None:
        return Verdict(0.0, f"the gold answer '{answer[:20]}' is no letter A to J", letter or "")
    if letter is None:
        return Verdict(0.0, "no letter is chosen")
    if letter != gold:
        return Verdict(0.0, f"chose {letter}, not {gold}", letter)
    return Verdict(1.0, f"chose {letter}", letter)
