"""A conversion's memory does not grow with the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpt_mega.checkpoint.hf import HFWriter
from hpt_mega.resharding.mapping import family_for
from hpt_mega.spec import Spec

SHARD_BYTES = 40_000_000
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "vocab_size": 20_001,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
# not ru_maxrss: a process begins with its parent's
MEASURE = """
import sys
from pathlib import Path
import torch._dynamo  # which reading a checkpoint imports, and with it all of triton: no part of a conversion
import hpt_mega.checkpoint.convert as convert
from hpt_mega.checkpoint.layout import TargetLayout

def resident(key):
    status = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in status if line.startswith(key))

Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = resident("VmRSS")
folder = Path(sys.argv[1])
silent = lambda done, total: None
if sys.argv[2] == "hf_to_megatron":
    convert.hf_to_megatron(folder / "hf", folder / "megatron", TargetLayout(tp=2, pp=2), silent)
else:
    convert.megatron_to_hf(folder / "megatron", folder / "back", None, silent)
print(resident("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int, int]:
    """A folder with a model of some hundred MB in `hf`; all its bytes, and those of its largest group."""
    folder = tmp_path_factory.mktemp("memory")
    config = CONFIG | {"num_hidden_layers": 14}
    family = family_for(config)
    entries = list(family.entries(family.read_shape(config)))
    specs = {
        name: Spec(torch.bfloat16, sizes)
        for entry in entries
        for name, sizes in entry.hf_shapes(family.read_shape(config)).items()
    }
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(config))
    with HFWriter(folder / "hf", specs, shard_bytes=SHARD_BYTES) as writer:
        for name, spec in specs.items():
            writer.write(name, torch.randn(spec.shape).to(spec.dtype))
        writer.finish()
    groups = [sum(specs[name].nbytes for name in entry.hf) for entry in entries]
    return folder, sum(groups), max(groups)


def test_peak_memory_is_below_the_largest_group_and_one_shard(folder: tuple[Path, int, int]) -> None:
    path, total, largest = folder
    for direction in ("hf_to_megatron", "megatron_to_hf"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(path), direction], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout)
        print(f"{direction}: {total / 1e6:.0f} MB, largest group {largest / 1e6:.0f}, peak {peak / 1e6:.0f}")
        assert peak < 1.25 * largest + SHARD_BYTES
    for file in sorted((path / "hf").iterdir()):
        assert (path / "back" / file.name).read_bytes() == file.read_bytes()
