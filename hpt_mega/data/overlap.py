"""Which questions of a benchmark stand in training data: shared runs of 13 words. No tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

WORDS = 13  # of a run, as in the decontamination of GPT-3 (arXiv 2005.14165, appendix C)

_WORD = re.compile(r"[a-z0-9]+")


def runs(text: str, words: int = WORDS) -> set[str]:
    """All runs of `words` words of a text, in lower case; a shorter text is one run of its own."""
    found = _WORD.findall(text.casefold())
    if len(found) <= words:
        return {" ".join(found)} if found else set()
    return {" ".join(found[i : i + words]) for i in range(len(found) - words + 1)}


class OverlapIndex:
    """The runs of words of a benchmark's questions, to which training texts are compared one by one.

    A question overlaps where a training text shares a run with it; one shorter than a run does where a
    training text is the same words and no more.
    """

    def __init__(self, questions: Sequence[str]) -> None:
        self._questions: dict[str, list[int]] = {}
        for index, question in enumerate(questions):
            for run in runs(question):
                self._questions.setdefault(run, []).append(index)
        self._found: dict[int, str] = {}

    def matches(self, text: str) -> dict[int, str]:
        """{question: the first in the alphabet of the runs it shares with the text}, by rising index."""
        found: dict[int, str] = {}
        for run in sorted(runs(text) & self._questions.keys()):
            for index in self._questions[run]:
                found.setdefault(index, run)
        return dict(sorted(found.items()))

    def add(self, texts: Iterable[str]) -> None:
        """Compare more training texts."""
        for text in texts:
            for index, run in self.matches(text).items():
                self._found[index] = min(run, self._found.get(index, run))

    @property
    def overlapping(self) -> dict[int, str]:
        """{question: a shared run}, by rising index."""
        return {index: self._found[index] for index in sorted(self._found)}
