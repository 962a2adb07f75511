"""config.json of a Hugging Face folder: what may be changed on the way out."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import torch

from hpt_mega.checkpoint.hf import copy_companions, with_context
from hpt_mega.resharding.mapping.shape import rope


def test_another_rotary_base_and_number_of_positions_reach_shape_and_export(tmp_path: Path) -> None:
    old = {"rope_theta": 10000, "max_position_embeddings": 4096, "dtype": "bfloat16", "vocab_size": 7}
    new = old | {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    for config in (old, new):
        changed = with_context(config, rope_theta=40000.0, max_positions=16384)
        assert rope(changed)["rope_theta"] == 40000.0
        assert changed["max_position_embeddings"] == 16384
        assert with_context(config) == config
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (source, out):
        folder.mkdir()
    (source / "config.json").write_text(json.dumps(old))
    (source / "config.json").chmod(0o444)
    copy_companions(source, out, torch.bfloat16, rope_theta=40000.0, max_positions=16384)
    assert (out / "config.json").stat().st_mode & stat.S_IWUSR  # or only root could change it again
    assert json.loads((out / "config.json").read_text()) == old | {
        "rope_theta": 40000.0,
        "max_position_embeddings": 16384,
        "dtype": "bfloat16",
    }
