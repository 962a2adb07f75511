"""A request from outside, by SIGUSR1, that a run saves at the end of its step and stops, to go on later."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hpt_mega.megatron.runtime import Layout

STOPPED_CODE = 75  # exit code of such a run; EX_TEMPFAIL of sysexits.h


_early: list[int] = []  # signals that came before there was an Interruption


def listen_early() -> None:
    """Keep a request for the Interruption to come: it would end a process that still imports or builds."""
    signal.signal(signal.SIGUSR1, lambda number, frame: _early.append(number))


class Interruption:
    """Listens once it is made; a scheduler's signal may reach some ranks before others, or only some."""

    def __init__(self) -> None:
        self._received = False
        signal.signal(signal.SIGUSR1, self._receive)
        self._received |= bool(_early)
        _early.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True

    def reached_any(self, layout: Layout) -> bool:
        """Whether any rank was asked; all ranks ask together and get the same answer."""
        return bool(layout.max_over_world([float(self._received)])[0])
