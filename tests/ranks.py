"""Runs a function on several gloo ranks, with a deadline, and brings back what each returned.

The ranks are forked from a server that has imported the product once: importing it takes a core ten seconds.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

DEADLINE_S = 480.0
IMPORTED = ["hpt_mega.worker"]  # which imports all that ranks use


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    folder: Path,
    *arguments: Any,
    deadline_s: float = DEADLINE_S,
) -> list[Any]:
    """Call `function(*arguments)` on `world_size` processes of one gloo job; returns rank 0's result first.

    `function` is a module's function; it finds its rank in the environment as under torchrun, and what it
    returns is plain data or tensors. Fails with the first rank's traceback, or after the deadline.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    job = (folder, dict(os.environ), function, arguments)
    processes = [
        context.Process(target=_rank, args=(rank, world_size, port, *job), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(deadline_s)
    late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for process in processes:
        process.kill()
    errors = [path.read_text() for path in sorted(folder.glob("error*.txt"), key=os.path.getmtime)]
    assert not errors, errors[0]
    assert not late, f"ranks {late} did not end within {deadline_s} s"
    return [torch.load(folder / f"result{rank}.pt", weights_only=True) for rank in range(world_size)]


def _rank(
    rank: int,
    world: int,
    port: int,
    folder: Path,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()  # the server's, which may be of an earlier test
    os.environ |= environment | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    torch.set_num_threads(1)
    try:
        torch.save(function(*arguments), folder / f"result{rank}.pt")
    except BaseException:
        (folder / f"error{rank}.txt").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise
