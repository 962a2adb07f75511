"""The process that compares answers symbolically: one JSON line in, one JSON line out, until its input ends.

Started by pool.py as `python -m hpt_mega.rewards.worker DEADLINE_S MEMORY_MIB [FUNCTION]`, it never imports
torch by itself. A function of the user's own is called here too.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from hpt_mega.rewards.compare import Outcome
from hpt_mega.rewards.compare import compare as compare_values
from hpt_mega.rewards.function import Function, call, load_function

FALLBACK_CHARACTERS = 300
_COMMAND = re.compile(r"\\([A-Za-z]+)")
# All that math-verify is asked to read; anything else is a wrong answer, and no risk.
_COMMANDS = frozenset(
    re.findall(
        r"\S+",
        "int sum prod lim limits left right frac dfrac tfrac sqrt pi infty cdot times to sin cos tan cot "
        "sec csc ln log exp arcsin arccos arctan mathbb mathrm text in cup cap setminus pm le leq ge geq "
        "lt gt neq ne quad begin end overline alpha beta gamma theta lambda mu omega phi binom "
        "displaystyle max min gcd lfloor rfloor lceil rceil mid vert circ ldots dots operatorname "
        "rightarrow ",
    )
)


def limit_resources(memory_mib: int) -> None:
    """Caps the address space, and lets the kernel itself end the process when its CPU timer runs out."""
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to the trainer, which ends us by closing the pipe
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # the trainer's; srun sends it to all that a task started
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


def die_with_pool() -> None:
    """From now on this process, and what it started, ends within a second of the process that started it.

    Also while a function sleeps or waits for a program. The kernel's parent-death signal would come as soon
    as the thread that started us ends, which the pool may outlive.
    """
    pool = os.getppid()

    def watch() -> None:
        while os.getppid() == pool:
            time.sleep(1.0)
        _end_session()

    threading.Thread(target=watch, daemon=True).start()


def _end_session() -> NoReturn:
    """End this process with all that it started, where pool.py gave it a session of its own."""
    if os.getsid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


def is_mathematical(text: str) -> bool:
    """Whether a text is short, of known commands and without identifiers: fit for a symbolic parser."""
    plain = _COMMAND.sub(" ", text)
    return (
        len(text) <= FALLBACK_CHARACTERS
        and set(_COMMAND.findall(text)) <= _COMMANDS
        and not re.search(r"__|[A-Za-z]{13}|[!^*]{3}|\d{30}", plain)
    )


def symbolic_comparison(deadline_s: float) -> Callable[[str, str], tuple[float, str]]:
    """compare(given, answer) -> (reward, why): by parts and values, the rest by math-verify.

    Each stage of math-verify gets a third of deadline_s.
    """
    from math_verify import parse, verify

    seconds = max(1, int(deadline_s / 3))

    def by_math_verify(given: str, answer: str) -> tuple[float, str]:
        expected = parse(f"\\boxed{{{answer}}}", parsing_timeout=seconds)
        value = parse(f"\\boxed{{{given}}}", parsing_timeout=seconds)
        if not expected or not value:
            return 0.0, "the answer does not parse" if expected else "the gold answer does not parse"
        same = verify(expected, value, timeout_seconds=seconds)
        return (1.0, "symbolically equal") if same else (0.0, "symbolically different")

    def compare(given: str, answer: str) -> tuple[float, str]:
        outcome: Outcome = compare_values(answer, given)
        if outcome.same is not None:
            return float(outcome.same), outcome.why
        if not is_mathematical(given):
            return 0.0, f"not read: {outcome.why}"
        return by_math_verify(given, answer)

    return compare


def _judged(
    request: dict[str, str], compare: Callable[[str, str], tuple[float, str]], functions: dict[str, Function]
) -> dict[str, Any]:
    """The reply to a request. What a parser or a function fails on earns nothing, and crashes no training."""
    given, answer, path = request["given"], request["answer"], request.get("function", "")
    failed = True
    try:
        if path and path not in functions:
            functions[path] = load_function(path)
        reward, why = call(functions[path], given, answer) if path else compare(given, answer)
        failed = False
    except MemoryError:
        reward, why = 0.0, "memory limit"
    except Exception as error:
        reward, why = 0.0, f"{type(error).__name__}: {error}"[:200]
    return {"reward": reward, "why": why, "failed": failed}


def main() -> int:
    die_with_pool()
    deadline_s, memory_mib = float(sys.argv[1]), int(sys.argv[2])
    # What a parser prints must not mix with the replies, and what a function starts must not read requests.
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w", buffering=1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nothing, stream)
    functions: dict[str, Function] = {}
    try:
        compare = symbolic_comparison(deadline_s)
        if path := "".join(sys.argv[3:]):
            functions[path] = load_function(path)  # now, so that its imports do not count against a response
    except ImportError as error:
        replies.write(json.dumps({"error": f"{error}. Install math-verify."}) + "\n")
        return 1
    except ValueError as error:
        replies.write(json.dumps({"error": str(error)}) + "\n")
        return 1
    limit_resources(memory_mib)
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in requests:
        request = json.loads(line)
        # A big-integer power holds the interpreter for minutes, deaf to Python signal handlers. This timer
        # ends such a process even when the trainer that would have killed it is gone.
        signal.setitimer(signal.ITIMER_PROF, 2 * deadline_s)
        reply = _judged(request, compare, functions)
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps(reply) + "\n")
    _end_session()


if __name__ == "__main__":
    sys.exit(main())
