"""What a misspelt name was probably meant to be, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" of the one or two closest names, also by their last dotted part; "" of none."""
    names = list(known)
    last = given.rpartition(".")[2]
    same_leaf = [name for name in names if name.rpartition(".")[2] == last]
    alike = difflib.get_close_matches(given, names, n=2, cutoff=0.75)
    close = same_leaf + [name for name in alike if name not in same_leaf]
    return f"; did you mean {' or '.join(close[:2])}?" if close else ""
