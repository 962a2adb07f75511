"""How a command ends: its exit code, and one line in place of a traceback where the world, not we, failed.

What a verb does, and the errors that are its own, are the verb's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from hpt_mega.config import ConfigError

FAILED = 1
CONFIG_ERROR = 2  # argparse's own for a wrong command line
INTERRUPTED = 130  # 128 + SIGINT
CUT_OFF = 141  # 128 + SIGPIPE: nobody reads on, as after `| head -1`


def concluded(work: Callable[[], int]) -> int:
    """Do the work and return its exit code: 0 done, 1 failed, 2 refused.

    In a rank, whose log is read by those who look for what went wrong, only refusals become a line.
    """
    try:
        code = work()
        sys.stdout.flush()
        return code
    except ConfigError as error:
        return _say(f"error: {error}", CONFIG_ERROR)
    except (OSError, KeyboardInterrupt) as error:
        if "RANK" in os.environ:
            raise
        return _end(error)


def _end(error: OSError | KeyboardInterrupt) -> int:
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted", INTERRUPTED)
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains as it ends
        return CUT_OFF
    return _say(f"error: {_words(error)}", FAILED)


def _words(error: OSError) -> str:
    return str(error) if error.filename is None else f"{error.filename}: {error.strerror}"


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code
