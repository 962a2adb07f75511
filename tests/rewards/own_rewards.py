"""Reward functions as a user may write them. No tests live here."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

NUMBER = 7


def length(response: str, answer: str) -> float:
    return min(1.0, len(response) / int(answer))


def explained(response: str, answer: str) -> tuple[bool, str]:
    print("what a function prints goes nowhere")
    return response == answer, f"{len(response)} characters"


def measured(response: str, answer: str) -> np.float32:
    return np.float32(0.25)


def slow(response: str, answer: str) -> float:
    while response == "hang":
        time.sleep(0.01)
    return 1.0


def hungry(response: str, answer: str) -> float:
    return float(len(bytearray(int(answer))) > 0)


def broken(response: str, answer: str) -> float:
    return {"nan": float("nan"), "two": 2.0}.get(response) or 1 / 0


def judge(response: str, answer: str) -> float:
    """Runs the response as a program, and keeps its process's number in the file `answer`."""
    program = subprocess.Popen([sys.executable, "-I", "-S", "-c", response])
    Path(answer).write_text(str(program.pid))
    return float(program.wait() == 0)


def overheard(response: str, answer: str) -> tuple[float, str]:
    """What a program reads from the standard input that it inherits."""
    heard = subprocess.run(["cat"], stdout=subprocess.PIPE, check=True).stdout
    return float(not heard), heard.decode()


def known(response: str, answer: str) -> tuple[float, str]:
    """Which of the environment variables in the response it is told."""
    found = [name for name in response.split() if name in os.environ]
    return float(not found), " ".join(found)
