"""The numbers of summary.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hpt_mega.config import Config, load
from hpt_mega.telemetry.summary import Summary, summarise
from tests.telemetry.conftest import final, initial, trained


@pytest.fixture
def summary(cfg: Config) -> Summary:
    records = [initial(), trained(1), trained(2), trained(3, **final())]
    return summarise(records, cfg, {"export": 3.0, "checkpoint": 1.5, "step": 5.0})


def test_accuracy_is_that_of_the_first_and_last_evaluation(cfg: Config) -> None:
    middle = {"eval/accuracy": 0.99, "eval/standard_error": 0.01, "eval/accuracy/sum": 1.0}
    found = summarise([initial(), trained(1, **middle), trained(2, **final()), trained(3)], cfg)
    assert (found.initial_accuracy, found.initial_standard_error) == (0.2, 0.04)
    assert (found.final_accuracy, found.final_standard_error) == (0.5, 0.03)
    assert found.accuracy_by_task == {
        "sum": {"initial": 0.3, "final": 0.9},
        "word problem": {"initial": 0.1, "final": 0.05},
    }


def test_the_gain_is_measured_in_standard_errors_of_the_difference(summary: Summary) -> None:
    assert summary.gain == pytest.approx(0.3)
    assert summary.gain_in_standard_errors == pytest.approx(0.3 / 0.05)  # 3-4-5: sqrt(.03^2 + .04^2)


def test_a_gain_without_spread_has_no_standard_errors(cfg: Config) -> None:
    exact = {"eval/accuracy": 1.0, "eval/standard_error": 0.0}
    found = summarise([{"step": 0, **exact}, trained(1, **exact)], cfg)
    assert found.gain == 0 and found.gain_in_standard_errors is None


def test_tokens_and_seconds_add_up_over_the_run(summary: Summary) -> None:
    assert summary.tokens == {"rollout": 6000, "trained": 1800}
    assert summary.seconds == {
        "rollout": 12.0,
        "reward": 0.75,
        "train": 6.0,
        "sync": 0.375,
        "eval": 0.0,
        "checkpoint": 1.5,
        "export": 3.0,
        "total": 24.5,
    }
    assert summary.tokens_per_s == {"rollout": 500.0, "train": 300.0}


def test_shares_of_time_add_up_to_the_whole(summary: Summary) -> None:
    phases = {name: (seconds, share) for name, seconds, share in summary.phases()}
    assert phases["total"] == (24.5, 1.0)
    assert phases["other"][0] == pytest.approx(24.5 - 12 - 0.75 - 6 - 0.375 - 1.5 - 3)
    assert math.fsum(share for name, (_, share) in phases.items() if name != "total") == pytest.approx(1)
    assert "eval" not in phases


def test_one_value_a_step(summary: Summary) -> None:
    assert summary.steps == 3 and summary.policy_version == 3
    assert summary.sft_fraction == [0.5, 0.25, 0.5 / 3]


def test_a_run_that_has_not_trained_has_a_summary(cfg: Config) -> None:
    found = summarise([initial()], cfg)
    assert found.steps == 0 and found.policy_version == 0 and found.sft_fraction == []
    assert found.initial_accuracy == found.final_accuracy == 0.2
    assert found.tokens_per_s == {"rollout": 0.0, "train": 0.0}
    assert found.phases()[-1] == ("total", 0.0, 0.0)


def test_a_run_that_has_not_begun_has_no_accuracy(cfg: Config) -> None:
    found = summarise([], cfg)
    assert found.initial_accuracy is None and found.final_accuracy is None and found.gain is None


def test_the_file_holds_all_that_is_needed_to_run_again(
    summary: Summary, cfg: Config, tmp_path: Path
) -> None:
    path = tmp_path / "summary.json"
    summary.save(path)
    written = json.loads(path.read_text())
    assert written["seed"] == cfg.seed and written["world_size"] == 3
    assert written["heldout_questions"] == 100
    config = tmp_path / "again.yaml"
    config.write_text(json.dumps(written["config"]))  # JSON is YAML
    assert load(config) == cfg
    assert set(written["versions"]) == {"python", "torch", "megatron-core", "transformers", "hpt_mega"}
    assert written["versions"]["megatron-core"] == "0.16.1"
    assert Summary.load(path) == summary
