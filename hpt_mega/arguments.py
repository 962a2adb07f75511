"""Words of command lines: kinds of options, whose refusals say what was expected, and quoted settings."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path


def at_least(least: int) -> Callable[[str], int]:
    """An option's `type`: a whole number from `least` on."""

    def whole_number(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least:
            raise argparse.ArgumentTypeError(f"{text!r} given, expected a whole number of {least} or above")
        return number

    return whole_number


def seconds(text: str) -> float:
    """An option's `type`: a time above 0."""
    try:
        given = float(text)
    except ValueError:
        given = 0.0
    if not 0 < given < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} given, expected seconds above 0")
    return given


def quoted(text: str | Path) -> str:
    """The text as a value that Hydra, and YAML, read back as it is: in quotes where it needs them."""
    value = str(text)
    if re.fullmatch(r"[\w./]([\w./@+ -]*[\w./@+-])?", value, re.ASCII):
        return value
    return f"'{value}'" if "'" not in value else '"' + value.replace('"', '\\"') + '"'
