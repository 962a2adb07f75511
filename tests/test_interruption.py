"""SIGUSR1 to one rank is known to all of them at the end of the step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from hpt_mega.interruption import Interruption
from tests.ranks import run_ranks


def signalled_on_the_last_rank() -> list[bool]:
    dist.init_process_group("gloo")
    interruption = Interruption()

    def max_over_world(values: list[float]) -> list[float]:
        total = torch.tensor(values)
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return total.tolist()

    layout = SimpleNamespace(max_over_world=max_over_world)
    before = interruption.reached_any(layout)  # type: ignore[arg-type]
    if dist.get_rank() == 2:
        os.kill(os.getpid(), signal.SIGUSR1)
    found = [before, interruption.reached_any(layout)]  # type: ignore[arg-type]
    dist.destroy_process_group()
    return found


def test_a_signal_to_one_rank_is_known_to_all(tmp_path: Path) -> None:
    assert run_ranks(signalled_on_the_last_rank, 3, tmp_path) == [[False, True]] * 3
