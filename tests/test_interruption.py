"""SIGUSR1 to one rank is known to all of them at the end of the step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from hpt_mega.interruption import Interruption, listen_early
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


def test_a_signal_before_the_run_is_built_is_kept_for_it_alone() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    try:
        listen_early()
        os.kill(os.getpid(), signal.SIGUSR1)
        alone = SimpleNamespace(max_over_world=lambda values: values)
        assert [Interruption().reached_any(alone) for _ in range(2)] == [True, False]  # type: ignore[arg-type]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_rank_of_a_job_listens_before_it_imports_what_takes_time() -> None:
    script = (
        "import sys, hpt_mega.slurm.__main__; print(sys.modules.keys() & {'torch', 'hydra', 'omegaconf'})"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "set()\n"


def test_a_signal_to_one_rank_is_known_to_all(tmp_path: Path) -> None:
    assert run_ranks(signalled_on_the_last_rank, 3, tmp_path) == [[False, True]] * 3
