"""Numbers of a config that lie outside their bounds, of any of the configs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from operator import attrgetter
from typing import Any

from hpt_mega.config import flattened

# What is no number at all misses the lower bounds only, so that it is told once.
FITS: dict[str, Callable[[float], bool]] = {
    "above 0": lambda value: value > 0,
    "0 or above": lambda value: value >= 0,
    "1 or above": lambda value: value >= 1,
    "below 1": lambda value: not value >= 1,
    "at most 1": lambda value: not value > 1,
}


def outside(cfg: Any, keys_of: Mapping[str, str]) -> Iterator[str]:
    """A problem for each number out of its bound. `keys_of`: by bound of FITS the dotted keys, with spaces
    between them."""
    for bound, keys in keys_of.items():
        for key in keys.split():
            if not FITS[bound](value := attrgetter(key)(cfg)):
                yield f"{key} is {value}, expected {bound}"


def infinite(cfg: Any, but: tuple[str, ...] = ()) -> Iterator[str]:
    """A problem for each infinite number whose key does not begin as one of `but`."""
    for key, value in flattened(asdict(cfg)):
        if value == math.inf and not key.startswith(but):
            yield f"{key} is {value}, expected a finite number"
