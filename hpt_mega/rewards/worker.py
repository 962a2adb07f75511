"""The process that compares answers symbolically: one JSON line in, one JSON line out, until its input ends.

Started by pool.py as `python -m hpt_mega.rewards.worker DEADLINE_S`. It never imports torch.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable

MEMORY_BYTES = 2 << 30


def limit_resources() -> None:
    """Caps the address space, and lets the kernel itself end the process when its CPU timer runs out."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to the trainer, which ends us by closing the pipe
    signal.signal(signal.SIGPROF, signal.SIG_DFL)


def symbolic_comparison(deadline_s: float) -> Callable[[str, str], tuple[float, str]]:
    """compare(given, answer) -> (reward, why) by math-verify; each stage gets a third of deadline_s."""
    from math_verify import parse, verify

    seconds = max(1, int(deadline_s / 3))

    def compare(given: str, answer: str) -> tuple[float, str]:
        try:
            expected = parse(f"\\boxed{{{answer}}}", parsing_timeout=seconds)
            value = parse(f"\\boxed{{{given}}}", parsing_timeout=seconds)
            if not expected or not value:
                return 0.0, "the answer does not parse" if expected else "the gold answer does not parse"
            same = verify(expected, value, timeout_seconds=seconds)
        except MemoryError:
            return 0.0, "memory limit"
        except Exception as error:  # what fails in the parser is a wrong answer, not a crash of training
            return 0.0, f"{type(error).__name__} in math-verify"
        return (1.0, "symbolically equal") if same else (0.0, "symbolically different")

    return compare


def main() -> int:
    deadline_s = float(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # whatever a parser prints must not mix with the replies
    try:
        compare = symbolic_comparison(deadline_s)
    except ImportError as error:
        replies.write(json.dumps({"error": str(error)}) + "\n")
        return 1
    limit_resources()
    replies.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        request = json.loads(line)
        # A big-integer power holds the interpreter for minutes, deaf to Python signal handlers. This timer
        # ends such a process even when the trainer that would have killed it is gone.
        signal.setitimer(signal.ITIMER_PROF, 2 * deadline_s)
        reward, why = compare(request["given"], request["answer"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(json.dumps({"reward": reward, "why": why}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
