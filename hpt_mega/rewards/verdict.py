"""What the grader says of a response. How it comes to that lives in math.py, choice.py and format.py."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """The reward of one response, from 0 to 1, the reason in a few words, and what it is about."""

    reward: float
    why: str
    given: str = ""  # the answer that was read in the response, "" where none was found
    failed: bool = False  # nothing was judged: an error, the deadline or the end of a worker
