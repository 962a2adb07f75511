"""`hpt train` with two real vLLMs: two pipeline stages, a server killed, samples asked for ahead."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hpt_mega.replay import read_batches
from hpt_mega.trajectory import Source
from tests import toy

pytest.importorskip("vllm", reason="vLLM is not installed: make .venv/.vllm")

DEADLINE_S = 400.0
STEPS = 6
SERVER = "vllm.entrypoints.launchers.api_server.entry"


def command(model: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "hpt_mega.cli", "train", *toy.settings(model)),
        *(f"run_dir={run_dir}", f"trainer.steps={STEPS}", "parallel=pp2", "precision=fp32", "rollout=vllm"),
        *("rollout.server.bucket_mib=2", *more),
    ]


def servers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The servers that a rank of the run has started; not their guards."""
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if child.cmdline()[1:3] == ["-m", SERVER]]


def wait_for_step(run_dir: Path, step: int) -> None:
    until = time.monotonic() + DEADLINE_S
    while not any(record["step"] >= step for record in toy.metrics(run_dir)):
        assert time.monotonic() < until, (run_dir / "logs" / "rank0.log").read_text()[-2000:]
        time.sleep(0.2)


@pytest.mark.timeout(2 * DEADLINE_S)
def test_a_run_outlives_a_server_loses_no_sample_and_trains_on_none_older_than_the_bound(
    tmp_path: Path,
) -> None:
    model, run_dir = toy.save_toy(tmp_path / "model", head_dim=32), tmp_path / "run"
    more = ("rollout.staleness=1", "rollout.server.engines=2", f"debug.save={tmp_path / 'trained.jsonl'}")
    process = subprocess.Popen(
        command(model, run_dir, *toy.ON_ALL_ROLLOUTS, *more),
        text=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        wait_for_step(run_dir, 2)
        servers = servers_of(process)
        family = [one for server in servers for one in (server, *server.children(recursive=True))]
        servers[0].kill()
        output, errors = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == 0, output + errors
    assert len(servers) == 2
    records = toy.metrics(run_dir)
    assert [record["step"] for record in records] == list(range(STEPS + 1))
    assert records[2]["sync/engines"] == 2
    for record in records[1:]:
        assert record["sync/probe_gap"] < 1e-4
        assert 0 <= record["staleness_max"] <= 1
        # a sample of the policy one step ago was scored by that policy
        if record["staleness_max"] == 0:
            assert record["logp_gap_max"] < 1e-3
    assert max(record["staleness_max"] for record in records[1:]) == 1
    assert json.loads((run_dir / "summary.json").read_text())["policy_version"] == STEPS
    batches = read_batches(tmp_path / "trained.jsonl")
    for step in range(1, STEPS + 1):
        drawn = [t for t in batches[step] if t.source is Source.ONLINE]
        assert sorted(t.group for t in drawn) == [0, 0, 1, 1]  # two questions, two rollouts each
        assert all(step - 2 <= t.policy_version < step for t in drawn)
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
