"""Saved batches come back with the same bits; a file that is none is refused with its line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpt_mega.replay import append_batch, read_batches
from hpt_mega.trajectory import Source, Trajectory
from tests.megatron.tiny import save_llama

TOKENIZER = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"

TOKENS = st.lists(st.integers(0, 200_000), min_size=1, max_size=5).map(tuple)
FLOATS = st.lists(st.floats(-1e4, 0), max_size=5).map(tuple)
TRAJECTORIES = st.builds(
    Trajectory,
    prompt_tokens=TOKENS,
    response_tokens=TOKENS,
    group=st.integers(0, 99),
    source=st.sampled_from(Source),
    policy_version=st.integers(0, 9),
    rollout_logp=FLOATS,
    reward=st.floats(0, 1),
    weight=st.floats(0, 1),
    pair=st.integers(-1, 9),
)


@given(batches=st.lists(st.lists(TRAJECTORIES, min_size=1, max_size=4), min_size=1, max_size=3))
def test_batches_come_back_with_the_same_bits(
    batches: list[list[Trajectory]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("replay") / "batches.jsonl"
    for step, batch in enumerate(batches, start=1):
        append_batch(file, step, batch)
    assert read_batches(file) == dict(enumerate(batches, start=1))


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"step": 1}', '{"step": 1, "text": "no trajectory"}'])
def test_another_file_is_refused_with_its_line(line: str, tmp_path: Path) -> None:
    file = tmp_path / "other.jsonl"
    append_batch(file, 1, [Trajectory((1,), (2,), 0, Source.ONLINE, 0)])
    with file.open("a") as out:
        out.write(line + "\n")
    with pytest.raises(ValueError, match=r"line 2: no trajectory of debug\.save"):
        read_batches(file)


def train(run_dir: Path, *overrides: str) -> dict[str, Any]:
    """The metrics of the last step of `hpt train experiment=tiny`."""
    command = [sys.executable, "-m", "hpt_mega.cli", "train", "experiment=tiny", *overrides]
    done = subprocess.run([*command, f"run_dir={run_dir}"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    record: dict[str, Any] = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return record


@pytest.mark.timeout(900)
def test_a_saved_batch_is_replayed_in_another_layout_with_the_same_loss(tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model", tied=True, vocabulary=49152)
    for file in (*TOKENIZER.glob("tokenizer*"), TOKENIZER / "chat_template.jinja"):
        shutil.copy(file, model)
    batch = tmp_path / "batch.jsonl"
    settings = (
        f"model.path={model}",
        "precision=fp32",
        "trainer.steps=1",
        "trainer.save_every=0",
        "trainer.export_hf=false",
        "data.heldout_questions=1",
        "gate=both",
    )
    saved = train(tmp_path / "saved", *settings, "parallel.pp=1", f"debug.save={batch}")
    layout = ("parallel.pp=1", "parallel.cp=2", "trainer.tokens_per_microbatch=200")
    replayed = train(tmp_path / "replayed", *settings, *layout, f"debug.replay={batch}")
    for name in ("loss", "entropy", "grad_norm", "tokens_trained", "sft_fraction", "trajectories"):
        assert replayed[name] == pytest.approx(saved[name], rel=1e-6), name
    assert saved["tokens_rollout"] > 0 == replayed["tokens_rollout"]
