"""The numbers of a run in other tools: trackers, Prometheus, Chrome's trace viewer."""

from __future__ import annotations

import importlib.util
import json
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from hpt_mega.telemetry import prometheus
from hpt_mega.telemetry.loggers import MODULES, numbers_of, open_loggers, problems
from hpt_mega.telemetry.metrics import PhaseTimer
from hpt_mega.telemetry.prometheus import PrometheusEndpoint
from hpt_mega.telemetry.trace import Trace

RECORD = {"step": 3, "reward": 0.25, "eval/accuracy": 1, "ok": True, "timing": {"train": 2.5}}
NUMBERS = {"reward": 0.25, "eval/accuracy": 1, "timing/train": 2.5}


def test_a_records_numbers_are_its_own_and_those_of_its_timing() -> None:
    assert numbers_of(RECORD) == NUMBERS


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (missing, unknown) = problems(["wandb", "tensorbored"])
    assert "pip install -e '.[wandb]'" in missing
    assert "'tensorbored', expected some of tensorboard, wandb, mlflow" in unknown


@pytest.mark.parametrize("name", MODULES)
def test_a_tracker_leaves_its_files_in_the_run_folder(name: str, tmp_path: Path) -> None:
    pytest.importorskip(MODULES[name], reason=f"the extra [{name}] is not installed")
    (logger,) = open_loggers([name], tmp_path)
    logger.log(3, NUMBERS)
    logger.close()
    assert any(path.is_file() and path.stat().st_size for path in tmp_path.rglob("*"))
    if name == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert [(event.step, event.value) for event in events.Scalars("reward")] == [(3, 0.25)]
    if name == "mlflow":
        import mlflow

        client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
        (experiment,) = client.search_experiments(filter_string=f"name = '{tmp_path.name}'")
        (run,) = client.search_runs([experiment.experiment_id])
        assert run.data.metrics["reward"] == 0.25


def test_prometheus_reads_the_latest_numbers_from_the_loopback_interface() -> None:
    endpoint = PrometheusEndpoint(0)
    try:
        endpoint.log(2, {"reward": 0.1})
        endpoint.log(3, NUMBERS)
        with urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        assert lines == ["hpt_step 3", "hpt_reward 0.25", "hpt_eval_accuracy 1", "hpt_timing_train 2.5"]
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"http://127.0.0.1:{endpoint.port}/", timeout=10)
    finally:
        endpoint.close()


def test_a_connection_that_asks_nothing_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "PATIENCE_S", 0.1)
    endpoint = PrometheusEndpoint(0)
    try:
        with socket.create_connection(("127.0.0.1", endpoint.port), timeout=10) as silent:
            assert silent.recv(1) == b""
    finally:
        endpoint.close()


def test_phases_become_events_that_nest_as_they_did(tmp_path: Path) -> None:
    timer = PhaseTimer()
    timer.trace = Trace(tmp_path / "logs" / "trace_rank2.json", rank=2)
    with timer.phase("train"), timer.phase("sync"):
        pass
    text = (tmp_path / "logs" / "trace_rank2.json").read_text()
    inner, outer = json.loads(text.rstrip(",\n") + "]")  # the format lets the end be absent
    assert (inner["name"], outer["name"]) == ("sync", "train")
    assert inner["pid"] == outer["pid"] == 2
    assert outer["dur"] >= inner["dur"]
    assert outer["ts"] <= inner["ts"] + 1e3
