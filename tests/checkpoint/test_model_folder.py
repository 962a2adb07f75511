"""A run starts from a Megatron checkpoint as from the Hugging Face folder that it was made of."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpt_mega.checkpoint.convert import hf_to_megatron
from hpt_mega.checkpoint.layout import TargetLayout
from hpt_mega.checkpoint.model_folder import read_model
from hpt_mega.config import ModelConfig, compose
from hpt_mega.validation import validate
from tests import toy


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Hugging Face folder, and the checkpoint that `hpt convert` makes of it, cut for two ranks."""
    folder = tmp_path_factory.mktemp("folders")
    hf = toy.save_toy(folder / "model")
    hf_to_megatron(hf, folder / "megatron", TargetLayout(tp=2), lambda done, total: None)
    return hf, folder / "megatron"


def bare(megatron: Path, out: Path) -> Path:
    """The checkpoint as Megatron-LM leaves one: without config and tokenizer."""
    shutil.copytree(megatron, out)
    shutil.rmtree(out / "hf")
    return out


def test_training_from_either_folder_gives_the_same_bits(folders: tuple[Path, Path], tmp_path: Path) -> None:
    hf, megatron = folders
    found = {}
    for folder in folders:
        run_dir = tmp_path / folder.name
        verb = [sys.executable, "-m", "hpt_mega.cli", "train", *toy.settings(folder)]
        subprocess.run(
            [*verb, "trainer.steps=2", "parallel=pp2", f"run_dir={run_dir}"],
            check=True,
            timeout=240,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        found[folder] = toy.metrics(run_dir)
    assert any("loss" in record for record in found[hf])
    assert found[megatron] == found[hf]


def test_a_checkpoint_that_brings_no_config_asks_for_it(folders: tuple[Path, Path], tmp_path: Path) -> None:
    hf, megatron = folders
    alone = bare(megatron, tmp_path / "ckpt")
    _, problems = read_model(ModelConfig(path=str(alone)))
    assert any("holds no config.json" in problem and "set model.hf" in problem for problem in problems)
    assert any("holds no tokenizer.json" in problem for problem in problems)
    config, problems = read_model(ModelConfig(path=str(alone), hf=str(hf)))
    assert (config["hidden_size"], problems) == (32, [])


def test_a_checkpoint_whose_weights_are_gone_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    hf, megatron = folders
    shutil.copytree(megatron, tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "ckpt" / "release")
    (problem,) = read_model(ModelConfig(path=str(tmp_path / "ckpt")))[1]
    assert "release holds neither .metadata (torch_dist) nor mp_rank_* (legacy)" in problem
    (problem,) = read_model(ModelConfig(path=str(hf), hf=str(hf)))[1]
    assert "is no Megatron checkpoint; leave it out" in problem


def test_a_server_is_told_that_it_cannot_start_from_a_checkpoint(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    cfg = compose([f"model.path={folders[1]}", f"run_dir={tmp_path}/run", "rollout=vllm"])
    with pytest.raises(ValueError, match="starts from a Hugging Face folder; make one by `hpt convert"):
        validate(cfg)
