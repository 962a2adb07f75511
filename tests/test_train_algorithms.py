"""A toy model trained by what needs more than a policy in fp32: a critic, pairs, a loss scale."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import toy

DEADLINE_S = 300.0

pytestmark = pytest.mark.timeout(2.5 * DEADLINE_S)


def even(response: str, answer: str) -> tuple[float, str]:
    """A reward that random weights earn about half of the time."""
    return float(len(response) % 2 == 0), "its length"


def broken(response: str, answer: str) -> float:
    raise LookupError(f"no case for {answer}")


def train(folder: Path, *overrides: str, precision: str = "fp32", code: int = 0) -> str:
    """What a run in folder/run prints."""
    model = folder / "model"
    if not model.exists():
        toy.save_toy(model)
    settings = (*toy.settings(model), f"precision={precision}", f"run_dir={folder / 'run'}", *overrides)
    command = [sys.executable, "-m", "hpt_mega.cli", "train", *settings]
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def forget_last_step(run: Path) -> None:
    """Leave the run as it was when its last step began."""
    shutil.rmtree(max((run / "checkpoints").glob("step_*")))
    records = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(records[:-1]))


@pytest.mark.parametrize(
    ("name", "parallel"), [("ppo", "pp2"), ("dpo", "single"), ("luffy", "single"), ("srft", "single")]
)
def test_a_run_cut_short_goes_on_with_the_numbers_of_the_whole_one(
    name: str, parallel: str, tmp_path: Path
) -> None:
    settings = (
        f"algorithm={name}",
        f"parallel={parallel}",
        f"reward.kind={__name__}.even",
        "rollout.rollouts_per_question=3",
        "trainer.steps=3",
        "trainer.updates_per_step=2",
        "trainer.save_every=1",
    )
    train(tmp_path, *settings)
    whole = toy.metrics(tmp_path / "run")
    assert all(record["grad_norm"] > 0 for record in whole[1:])
    assert all(0 < record["reward"] < 1 and record["reward_failed"] == 0 for record in whole[1:])
    assert all(("value_loss" in record) == (name == "ppo") for record in whole[1:])
    assert all((record["sft_fraction"] > 0) == (name in ("luffy", "srft")) for record in whole[1:])
    forget_last_step(tmp_path / "run")
    assert "going on after step 2" in train(tmp_path, *settings, "resume=auto")
    assert toy.metrics(tmp_path / "run") == whole


def test_a_run_whose_reward_fails_on_every_response_stops_and_says_why(tmp_path: Path) -> None:
    said = train(tmp_path, "parallel=single", f"reward.kind={__name__}.broken", "trainer.steps=2", code=1)
    assert "no response of step 1 could be judged, one because of: LookupError: no case for " in said
    assert [record["step"] for record in toy.metrics(tmp_path / "run")] == [0]
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert samples and all(json.loads(line)["why"].startswith("LookupError: ") for line in samples)


def test_the_loss_scale_of_fp16_skips_a_step_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    settings = (
        "parallel=pp2",
        "gate=both",
        f"reward.kind={__name__}.even",
        "trainer.steps=3",
        "trainer.save_every=1",
        f"precision.loss_scale={2**19}",  # twice of it is too much for the toy's gradient
        "precision.loss_scale_window=2",
    )
    train(tmp_path, *settings, precision="fp16")
    whole = toy.metrics(tmp_path / "run")
    assert [record["skipped"] for record in whole[1:]] == [0, 0, 1]
    assert [record["loss_scale"] for record in whole[1:]] == [2**19, 2**20, 2**19]
    forget_last_step(tmp_path / "run")
    assert "going on after step 2" in train(tmp_path, *settings, "resume=auto", precision="fp16")
    assert toy.metrics(tmp_path / "run") == whole


def test_preference_pairs_from_a_file_need_no_rollouts(tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"{i} + {i}?", "answer": str(2 * i), "demonstration": f"{2 * i}", "rejected": f"{i}{i}"}
        for i in range(1, 7)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(pair) for pair in pairs))
    train(
        tmp_path,
        "algorithm=dpo",
        "parallel=pp2",
        "gate=demonstrations",
        "rollout.rollouts_per_question=0",
        f"data.train_file={tmp_path}/pairs.jsonl",
        "data.train_questions=6",
        "trainer.steps=4",
    )
    losses = [record["objective/advantage_std"] for record in toy.metrics(tmp_path / "run")[1:]]
    assert losses[-1] < losses[0]  # beta σ(-Δ) falls as the margin grows
    assert "reward" not in toy.metrics(tmp_path / "run")[-1]
    assert (tmp_path / "run" / "report.html").is_file()
