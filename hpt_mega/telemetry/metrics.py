"""Wall-clock seconds by phase of the training step.

What becomes of them lives in records.py, summary.py and plots.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpt_mega.telemetry.trace import Trace


class PhaseTimer:
    """Charges every second to the innermost open phase, so that the phases' seconds add up."""

    def __init__(self) -> None:
        self.trace: Trace | None = None  # also gets every phase, where there is one
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._failed: str | None = None
        self._charged_until = self._taken_at = time.perf_counter()

    @property
    def current(self) -> str | None:
        """The innermost open phase, or the one an exception came out of until another one begins."""
        return self._failed or (self._open[-1] if self._open else None)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the block to `name`, except for the phases opened within it."""
        self._charge()
        self._open.append(name)
        self._failed = None
        begun = time.perf_counter()
        try:
            yield
        except BaseException:
            self._failed = self._failed or name  # an inner phase that failed first is the culprit
            raise
        else:
            self._failed = None
        finally:
            self._charge()
            self._open.pop()
            if self.trace is not None:
                self.trace.phase(name, time.perf_counter() - begun)

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call (or the start), and under "step" all that passed since."""
        self._charge()
        taken = self._seconds | {"step": self._charged_until - self._taken_at}
        self._seconds = {}
        self._taken_at = self._charged_until
        return taken

    def now(self) -> float:
        """Seconds since the epoch, comparable between ranks as far as their clocks agree."""
        return time.time()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            name = self._open[-1]
            self._seconds[name] = self._seconds.get(name, 0.0) + now - self._charged_until
        self._charged_until = now
