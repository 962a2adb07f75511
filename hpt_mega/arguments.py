"""Kinds of values of command-line options, whose refusals say what was given and expected."""

from __future__ import annotations

import argparse
from collections.abc import Callable


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
