r"""Verdicts on the form of a response alone: thoughts in <think>...</think>, then an answer in \boxed{...}.

It is the form that LUFFY's system message asks for. Whether the answer is right is math.py's matter.
"""

from __future__ import annotations

from hpt_mega.rewards.math import TAIL_CHARACTERS, last_boxed
from hpt_mega.rewards.verdict import Verdict

OPEN, CLOSE = "<think>", "</think>"


def format_verdict(response: str, answer: str) -> Verdict:
    r"""1 where thoughts come first and once, and a \boxed{...} with something in it follows them.

    The opening tag may be absent: a prompt may end with it. The gold answer is not looked at. What is given
    is the box after the last closing tag, whatever the form.
    """
    thoughts, _, solution = response.rpartition(CLOSE)
    boxed = (last_boxed(solution[-TAIL_CHARACTERS:]) or "").strip()
    if response.count(CLOSE) != 1 or response.count(OPEN) > 1:
        return Verdict(0.0, f"expected one {CLOSE}, found {response.count(CLOSE)}", boxed)
    if OPEN in solution or (OPEN in thoughts and not thoughts.lstrip().startswith(OPEN)):
        return Verdict(0.0, f"{OPEN} does not come first", boxed)
    if not thoughts.replace(OPEN, "").strip():
        return Verdict(0.0, "no thoughts", boxed)
    if not boxed:
        return Verdict(0.0, "no boxed answer after the thoughts")
    return Verdict(1.0, "thoughts, then a boxed answer", boxed)
