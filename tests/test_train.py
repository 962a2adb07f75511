"""`hpt train` as its user starts it, with the demo's real weights: what it leaves, and what a kill costs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpt_mega.checkpoint.hf import HFCheckpoint
from hpt_mega.config import load, native_dtype
from tests.ranks import run_ranks
from tests.toy import metrics

MODEL = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"
STEPS = 4
SETTINGS = (
    f"model.path={MODEL}",
    "data.tasks=[{name: products, options: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}]",
    "data.train_questions=24",
    "data.heldout_questions=5",
    "rollout.rollouts_per_question=3",
    "rollout.max_new_tokens=40",
    f"trainer.steps={STEPS}",
    "trainer.questions_per_step=3",
    "trainer.tokens_per_microbatch=400",
    "trainer.save_every=2",
    "trainer.deterministic=true",
    "trainer.keep_checkpoints=1",  # a gigabyte each
    "optimizer.lr=1e-4",
    "precision=native",
)
DEADLINE_S = 480.0

pytestmark = pytest.mark.timeout(1200)


def start(run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    """`hpt train` in a session of its own, its output in run_dir.log."""
    command = [sys.executable, "-m", "hpt_mega.cli", "train", *SETTINGS, f"run_dir={run_dir}", *overrides]
    with run_dir.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str], run_dir: Path, expected: int = 0) -> str:
    """Wait for its end and return what it printed."""
    code = process.wait(DEADLINE_S)
    output = run_dir.with_suffix(".log").read_text()
    assert code == expected, output
    return output


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    file = run_dir / "metrics.jsonl"
    wait_until(lambda: file.is_file() and f'"step": {step},' in file.read_text(), run_dir, process)


def wait_until(condition: Callable[[], bool], run_dir: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, run_dir.with_suffix(".log").read_text()
        assert time.monotonic() < end, f"it was not seen within {DEADLINE_S} s"
        time.sleep(0.05)


def family_tree(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(start(run_dir), run_dir)
    return run_dir


@pytest.fixture
def killed_run(tmp_path: Path) -> Path:
    """A run whose launcher got SIGKILL once its checkpoint of step 2 was there.

    It was written while training went on, unlike those of the run that is never killed.
    """
    run_dir = tmp_path / "run"
    process = start(run_dir, "trainer.async_save=true")
    wait_until((run_dir / "checkpoints" / "step_000002").is_dir, run_dir, process)
    ranks = family_tree(process)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive, "processes outlived the launcher"
    return run_dir


def test_a_run_leaves_all_its_outputs(finished_run: Path) -> None:
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "report.html", "plots/reward.png", "hf"):
        assert (finished_run / name).exists(), name
    assert [record["step"] for record in metrics(finished_run)] == list(range(STEPS + 1))
    summary = json.loads((finished_run / "summary.json").read_text())
    assert summary["steps"] == summary["policy_version"] == STEPS
    assert {"rollout", "reward", "train", "sync", "eval", "checkpoint", "export"} <= set(summary["seconds"])
    assert summary["heldout_questions"] == 5
    assert len(summary["sft_fraction"]) == STEPS
    assert load(finished_run / "config.yaml").trainer.steps == STEPS


def test_a_run_learns_from_rollouts_and_from_demonstrations(finished_run: Path) -> None:
    fractions = [record["sft_fraction"] for record in metrics(finished_run)[1:]]
    assert any(fraction > 0 for fraction in fractions)
    assert any(fraction < 1 for fraction in fractions)
    assert all(record["grad_norm"] > 0 for record in metrics(finished_run)[1:])


def exported_equals_checkpoint(run_dir: Path) -> list[str]:
    """Names of this rank's parameters whose bits differ between the last checkpoint and the export."""
    from hpt_mega.checkpoint.weights import own_entries
    from hpt_mega.megatron import runtime
    from hpt_mega.megatron.model import DTYPES, build_model
    from hpt_mega.megatron.optimizer import build_optimizer, wrap_data_parallel
    from hpt_mega.megatron.state import load_state
    from hpt_mega.resharding.mapping import family_for

    cfg = load(run_dir / "config.yaml")
    layout = runtime.initialize(cfg)
    exported = HFCheckpoint(run_dir / "hf")
    family = family_for(exported.config)
    shape = family.read_shape(exported.config)
    model = build_model(shape, cfg.parallel, layout, DTYPES[cfg.precision.dtype])
    wrapped = wrap_data_parallel(model, cfg)
    last = run_dir / "checkpoints" / f"step_{STEPS:06d}"
    load_state(last, model, build_optimizer(wrapped, cfg), layout, cfg)
    different = []
    for entry, parameter in own_entries(model, family, shape):
        part = entry.fusion.shard([exported.tensor(name) for name in entry.hf], shape, 0, 1)
        if not torch.equal(part, parameter):
            different.append(entry.megatron)
    runtime.shutdown()
    return different


def test_the_export_is_the_last_checkpoint_bit_for_bit_and_not_the_start(
    finished_run: Path, tmp_path: Path
) -> None:
    assert run_ranks(exported_equals_checkpoint, 2, tmp_path, finished_run) == [[], []]
    begun, ended = HFCheckpoint(MODEL), HFCheckpoint(finished_run / "hf")
    assert set(begun.names()) == set(ended.names())
    moved = [name for name in begun.names() if not torch.equal(begun.tensor(name), ended.tensor(name))]
    assert "model.layers.0.self_attn.q_proj.weight" in moved


def test_transformers_loads_the_export_and_answers_with_it(finished_run: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(finished_run / "hf")
    model = AutoModelForCausalLM.from_pretrained(finished_run / "hf")
    assert model.dtype is (torch.bfloat16 if native_dtype() == "bf16" else torch.float32)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is 2 * 3?"}], add_generation_prompt=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert answer.shape[1] > prompt["input_ids"].shape[1]


def test_a_killed_and_resumed_run_has_the_numbers_of_one_never_killed(
    finished_run: Path, killed_run: Path
) -> None:
    steps = [record["step"] for record in metrics(killed_run)]
    assert steps in ([0, 1, 2, 3], [0, 1, 2, 3, 4])
    assert "going on after step 2" in finish(start(killed_run, "resume=auto"), killed_run)
    assert metrics(killed_run) == metrics(finished_run)
    whole, resumed = HFCheckpoint(finished_run / "hf"), HFCheckpoint(killed_run / "hf")
    assert all(torch.equal(whole.tensor(name), resumed.tensor(name)) for name in whole.names())


def test_a_rank_that_dies_ends_the_run_and_is_named(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for_step(run_dir, 1, process)
    (victim,) = [child for child in family_tree(process) if child.environ().get("RANK") == "1"][:1]
    os.kill(victim.pid, signal.SIGKILL)
    output = finish(process, run_dir, expected=1)
    assert "rank 1 was killed by SIGKILL" in output
    assert not (run_dir / "summary.json").exists()


def test_a_terminated_run_takes_its_processes_with_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir)
    wait_for_step(run_dir, 0, process)
    ranks = family_tree(process)
    process.terminate()
    finish(process, run_dir, expected=128 + signal.SIGTERM)
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive
