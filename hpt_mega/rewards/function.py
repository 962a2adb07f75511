"""A reward function of the user's own, named by its dotted path; it runs in the reward workers.

def reward(response: str, answer: str) -> float | tuple[float, str]     # 0 to 1, and why

A response that it raises on earns 0 too, as one that could not be judged: a step of nothing else ends a run.
It may do what the user may. Code that it runs is not shown the run's secrets: environment variables whose
names say key, token, secret or password (HPT_ROLLOUT_KEY, HF_TOKEN) are left out, and a key that it needs
itself it reads from a file. What it starts is ended with its worker, at the deadline or as the run ends.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib import import_module
from numbers import Real
from typing import Any

Function = Callable[[str, str], Any]

_DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


def is_dotted(kind: str) -> bool:
    return _DOTTED.fullmatch(kind) is not None


def load_function(path: str) -> Function:
    """The function at MODULE.NAME. Raises ValueError that says what is missing."""
    module, _, name = path.rpartition(".")
    try:
        function = getattr(import_module(module), name)
    except ImportError as error:
        raise ValueError(f"{path}: {error}; its module must be installed or stand on PYTHONPATH") from error
    except AttributeError:
        raise ValueError(f"{path}: module {module} has no {name}") from None
    if not callable(function):
        raise ValueError(f"{path} is a {type(function).__name__}, expected a function of (response, answer)")
    found: Function = function
    return found


def call(function: Function, response: str, answer: str) -> tuple[float, str]:
    """(reward, why) of one response. Raises ValueError where it gives no number from 0 to 1."""
    given = function(response, answer)
    value, why = given if isinstance(given, tuple) and len(given) == 2 else (given, "")
    if not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"it returned {value!r}, expected a number from 0 to 1")
    return float(value), str(why)
