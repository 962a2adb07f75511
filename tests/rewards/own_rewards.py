"""Reward functions as a user may write them. No tests live here."""

from __future__ import annotations

import time

NUMBER = 7


def length(response: str, answer: str) -> float:
    return min(1.0, len(response) / int(answer))


def explained(response: str, answer: str) -> tuple[bool, str]:
    print("what a function prints goes nowhere")
    return response == answer, f"{len(response)} characters"


def slow(response: str, answer: str) -> float:
    while response == "hang":
        time.sleep(0.01)
    return 1.0


def hungry(response: str, answer: str) -> float:
    return float(len(bytearray(int(answer))) > 0)


def broken(response: str, answer: str) -> float:
    return {"nan": float("nan"), "two": 2.0}.get(response) or 1 / 0
