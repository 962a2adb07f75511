"""The examples run, and show what they say."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hpt_mega.config import compose, load
from hpt_mega.validation import validate
from tests.toy import save_toy, settings

EXAMPLES = Path(__file__).parents[1] / "examples"
WITHOUT_MEGATRON = """
import runpy, sys
sys.modules["megatron"] = None
sys.argv[1:] = {rows!r}
runpy.run_path({path!r}, run_name="__main__")
"""


def one_gradient(*rows: str) -> list[dict[str, list[str]]]:
    """The cells of each row, where a rollout is right and where none is."""
    code = WITHOUT_MEGATRON.format(rows=list(rows), path=str(EXAMPLES / "one_gradient.py"))
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    tables = printed.split("rollouts right\n")[1:]
    return [{line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]} for table in tables]


def test_one_gradient_shows_that_hpt_learns_from_the_demonstration_where_grpo_learns_nothing() -> None:
    solved, unsolved = one_gradient("grpo", "hpt", "sft")
    *rollouts, demonstration = map(float, solved["hpt"])
    assert rollouts[0] > 0 > max(rollouts[1:]) and demonstration == 0
    *rollouts, demonstration = map(float, unsolved["hpt"])
    assert rollouts == [0, 0, 0, 0] and demonstration > 0
    assert [float(cell) for cell in unsolved["grpo"][:4]] == [0, 0, 0, 0] and unsolved["grpo"][4] == "-"
    assert float(unsolved["sft"][4]) == pytest.approx(1 / 5)  # a mean over its five tokens


def test_one_gradient_says_which_rows_it_can_show() -> None:
    command = [sys.executable, str(EXAMPLES / "one_gradient.py"), "grpo", "nope", "dpo", "ppo"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == ""
    refused, said = ended.stderr.strip().split("; give some of: ")
    assert refused == "cannot show nope, dpo, ppo"
    shown = said.split(", ")
    assert {"sft", "grpo", "hpt"} < set(shown) and list(one_gradient(*shown)[1]) == shown


def test_own_task_trains_on_its_own_files_and_reward(tmp_path: Path) -> None:
    toy = settings(save_toy(tmp_path / "toy"))
    overrides = [one for one in toy if not one.startswith(("data.tasks", "data.train_questions"))]
    command = [EXAMPLES / "own_task" / "run.sh", *overrides, "parallel=single", f"run_dir={tmp_path / 'run'}"]
    environment = os.environ | {"HPT": str(Path(sys.executable).with_name("hpt"))}
    subprocess.run([*map(str, command), "trainer.steps=1"], env=environment, check=True, timeout=600)
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all("How many" in sample["question"] for sample in samples) and len(samples) > 1
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == 1 and summary["final_accuracy"] is not None
    assert load(tmp_path / "run" / "config.yaml").reward.kind == "units.near"


@pytest.mark.parametrize(
    ("response", "reward"),
    [(r"\boxed{200}", 1), (r"\boxed{1} then \boxed{201}", 1), (r"\boxed{210}", 0), ("200", 0)],
)
def test_own_task_s_reward_lets_pass_what_is_within_a_percent(
    response: str, reward: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "own_task")
    assert importlib.import_module("units").near(response, "200")[0] == reward


def test_smollm2_gsm_gives_three_algorithms_the_same_questions_and_steps(tmp_path: Path) -> None:
    stub = tmp_path / "hpt"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" "" >> {tmp_path}/calls\n')
    stub.chmod(0o755)
    subprocess.run([EXAMPLES / "smollm2_gsm" / "run.sh"], env=os.environ | {"HPT": str(stub)}, check=True)
    *trained, report = [call.split("\n") for call in (tmp_path / "calls").read_text().strip().split("\n\n")]
    assert report == ["report", "runs/smollm2_gsm"]
    configs = [compose(settings) for verb, *settings in trained if verb == "train"]
    for cfg in configs:
        validate(cfg)
    assert [cfg.algorithm.name for cfg in configs] == ["hpt", "grpo", "sft"]
    assert {Path(cfg.run_dir) for cfg in configs} == {
        Path("runs/smollm2_gsm") / c.algorithm.name for c in configs
    }
    assert [cfg.rollout.rollouts_per_question for cfg in configs] == [4, 4, 0]
    hpt = configs[0]
    own = {name: getattr(hpt, name) for name in ("algorithm", "gate", "rollout", "run_dir")}
    assert [replace(cfg, **own) for cfg in configs] == [hpt] * 3
