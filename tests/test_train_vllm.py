"""`hpt train` with a real vLLM: two pipeline stages, a server that is killed, samples asked for ahead."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import toy

pytest.importorskip("vllm", reason="vLLM is not installed: make .venv/.vllm")

DEADLINE_S = 280.0
STEPS = 6
SERVER = "vllm.entrypoints.launchers.api_server.entry"


def command(model: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "hpt_mega.cli", "train", *toy.settings(model)),
        *(f"run_dir={run_dir}", f"trainer.steps={STEPS}", "parallel=pp2", "precision=fp32", "rollout=vllm"),
        *("rollout.server.bucket_mib=2", *more),
    ]


def server_of(process: subprocess.Popen[str]) -> psutil.Process:
    """The server that a rank of the run has started."""
    children = psutil.Process(process.pid).children(recursive=True)
    (server,) = [child for child in children if SERVER in child.cmdline()]
    return server


def wait_for_step(run_dir: Path, step: int) -> None:
    until = time.monotonic() + DEADLINE_S
    while not any(record["step"] >= step for record in toy.metrics(run_dir)):
        assert time.monotonic() < until, (run_dir / "logs" / "rank0.log").read_text()[-2000:]
        time.sleep(0.2)


@pytest.mark.timeout(2 * DEADLINE_S)
def test_a_run_outlives_its_server_and_trains_on_no_sample_older_than_the_bound(tmp_path: Path) -> None:
    model, run_dir = toy.save_toy(tmp_path / "model", head_dim=32), tmp_path / "run"
    process = subprocess.Popen(
        command(model, run_dir, "rollout.staleness=1"),
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        wait_for_step(run_dir, 2)
        family = [server_of(process), *server_of(process).children(recursive=True)]
        family[0].kill()
        output, errors = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 0, output + errors
    records = toy.metrics(run_dir)
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    for record in records[1:]:
        assert record["sync/probe_gap"] < 1e-4
        assert 0 <= record["staleness_max"] <= 1
        # a sample of the policy one step ago was scored by that policy
        if record["staleness_max"] == 0:
            assert record["logp_gap_max"] < 1e-3
    assert max(record["staleness_max"] for record in records[1:]) == 1
    assert json.loads((run_dir / "summary.json").read_text())["policy_version"] == STEPS
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
