"""Fixtures that several folders of tests use."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("hpt", deadline=None)  # a busy machine makes no test wrong
settings.load_profile("hpt")


@pytest.fixture(autouse=True)
def outside_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests read no layout from the job that may run them."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with the files of a Hugging Face model of a given shape, and no weights in them."""

    def make(**shape: Any) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        default = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": 576,
            "vocab_size": 49152,
            "rms_norm_eps": 1e-5,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "num_hidden_layers": 30,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
        }
        (folder / "config.json").write_text(json.dumps(default | shape))
        (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
        (folder / "tokenizer.json").touch()
        return folder

    return make
