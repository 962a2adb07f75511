"""A rank's phases in Chrome's trace format, logs/trace_rank*.json for chrome://tracing or Perfetto."""

from __future__ import annotations

import json
import time
from pathlib import Path


class Trace:
    """Appends an event a phase; the format allows the closing bracket to be absent, as after a kill."""

    def __init__(self, path: Path, rank: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        begins = not path.exists()
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._rank = rank
        if begins:
            self._file.write("[\n")

    def phase(self, name: str, seconds: float) -> None:
        """A phase that ends now. Times are microseconds since the epoch, so that ranks line up."""
        begun = (time.time() - seconds) * 1e6
        event = {"name": name, "ph": "X", "ts": begun, "dur": seconds * 1e6, "pid": self._rank, "tid": 0}
        self._file.write(json.dumps(event) + ",\n")
