r"""This task's reward: is the quantity in \boxed{} right? Reward workers import it by PYTHONPATH."""

from __future__ import annotations

import re


def near(response: str, answer: str) -> tuple[float, str]:
    """1 within 1 % of the answer, else 0; and why."""
    found = re.findall(r"\\boxed\{\s*(-?\d+(?:\.\d+)?)\s*\}", response)
    if not found:
        return 0.0, "no number in \\boxed{}"
    given, wanted = float(found[-1]), float(answer)
    right = abs(given - wanted) <= 0.01 * abs(wanted)
    return float(right), f"{given:g} for {wanted:g}"
