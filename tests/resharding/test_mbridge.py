"""mbridge, an independent converter, makes the same Megatron weights of a folder, and a folder of them.

It is an oracle for tests only. It knows Transformer Engine's layer spec, which needs a GPU; the shim below
shows it megatron-core's own layers under those names, written down here anew rather than read from our table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig

from hpt_mega.checkpoint.hf import HFCheckpoint
from hpt_mega.checkpoint.weights import export_hf, load_hf
from hpt_mega.resharding.mapping import family_for
from hpt_mega.resharding.mapping.fusion import padded_vocab_size
from tests.checkpoint.families import save_model
from tests.checkpoint.jobs import Job, build_chunks, start
from tests.ranks import run_ranks

# Those of families.MODELS that mbridge converts; not llama_tied, for whose last stage it seeks an lm_head in
# the folder, and no Mistral. The tied one is the last of its kind: mbridge changes its class's table for it.
DENSE = ("llama", "qwen2", "qwen3", "qwen2_tied")
MIXTURES = ("qwen3_moe", "mixtral", "deepseek_v3")


class UnderTransformerEnginesNames:
    """As much of a model as mbridge looks at."""

    def __init__(self, model: Any) -> None:
        self.decoder = model.decoder
        self._model = model
        mark_split_weights(model)
        self._names = set(model.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return {self._renamed(name): value for name, value in self._model.state_dict().items()}

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return ((self._renamed(name), parameter) for name, parameter in self._model.named_parameters())

    def _renamed(self, name: str) -> str:
        if not (found := re.match(r"(decoder\.layers\.\d+\.)(.+)", name)):
            return name
        layer, rest = found.groups()
        if f"{layer}self_attention.linear_kv_down_proj.weight" in self._names:
            rest = re.sub(
                r"self_attention\.(q|kv)_layernorm\.",
                r"self_attention.linear_\1_up_proj.layer_norm_",
                rest,
            )
        else:
            rest = re.sub(r"^input_layernorm\.", "self_attention.linear_qkv.layer_norm_", rest)
        if f"{layer}mlp.router.weight" not in self._names:
            rest = re.sub(r"^pre_mlp_layernorm\.", "mlp.linear_fc1.layer_norm_", rest)
        return layer + re.sub(
            r"experts\.local_experts\.(\d+)\.(linear_fc\d)\.weight", r"experts.\2.weight\1", rest
        )


def mark_split_weights(model: Any) -> None:
    """megatron-core does so where it initialises them, which is never asked for here."""
    from megatron.core.tensor_parallel import layers

    for module in model.modules():
        row, column = layers.RowParallelLinear, (layers.ColumnParallelLinear, layers.VocabParallelEmbedding)
        if not isinstance(module, (row, *column)) or module.weight is None:
            continue
        if not hasattr(module.weight, "tensor_model_parallel"):
            layers.set_tensor_model_parallel_attributes(module.weight, True, int(isinstance(module, row)), 1)


def bridge_of(folder: Path, shape: Any, tp: int) -> Any:
    """mbridge's converter for a folder, for fp32."""
    from mbridge import AutoBridge
    from mbridge.core.bridge import Bridge
    from mbridge.models import DeepseekV3Bridge
    from megatron.core.transformer import MLATransformerConfig

    def renamed(max_position_embeddings: int, **rest: Any) -> Any:  # in megatron-core 0.16
        return MLATransformerConfig(original_max_position_embeddings=max_position_embeddings, **rest)

    DeepseekV3Bridge.TransformerConfigClass = staticmethod(renamed)
    config = AutoConfig.from_pretrained(folder)
    config.rope_theta = shape.rotary_base  # transformers 5 moved it
    config.rope_scaling = None  # where rotary angles come from is no matter of weights
    bridge = AutoBridge.from_config(config, dtype=torch.float32, make_vocab_size_divisible_by=tp)
    # what its own way to build a model would note; and DeepSeek's reader of FP8 files needs a GPU
    bridge.vocab_size, bridge.padded_vocab_size = shape.vocab_size, padded_vocab_size(shape.vocab_size, tp)
    bridge._get_safetensor_io = Bridge._get_safetensor_io.__get__(bridge)
    return bridge


def convert_twice(job: Job, names: tuple[str, ...], models: Path, out: Path) -> list[str]:
    """What differs between our and mbridge's conversion, either way; the export ends in `out`."""
    layout = start(job)
    different = []
    for name in names:
        checkpoint = HFCheckpoint(models / name)
        family = family_for(checkpoint.config)
        shape = family.read_shape(checkpoint.config)
        ours, theirs = build_chunks(shape, job), build_chunks(shape, job)
        load_hf(ours[0], checkpoint, family, shape, layout)
        bridge = bridge_of(models / name, shape, job.tp)
        with torch.no_grad():
            for chunk in theirs:
                for tensor in chunk.state_dict().values():
                    if torch.is_tensor(tensor):
                        tensor.fill_(7.0)
            bridge.load_weights([UnderTransformerEnginesNames(chunk) for chunk in theirs], str(models / name))
            exported = dict(bridge.export_weights([UnderTransformerEnginesNames(chunk) for chunk in ours]))
        for mine, other in zip(ours, theirs, strict=True):
            different += [
                f"{name}: {key} in Megatron"
                for key, tensor in mine.state_dict().items()
                if torch.is_tensor(tensor) and not torch.equal(tensor, other.state_dict()[key])
            ]
        export_hf(ours[0], family, shape, out / name, models / name, layout)
        if layout.rank == 0:
            different += differences(name, HFCheckpoint(out / name), exported, tied=shape.tied)
    return different


def differences(name: str, mine: HFCheckpoint, theirs: dict[str, Tensor], *, tied: bool) -> list[str]:
    if tied:  # the last pipeline stage's copy, under a name that no tied folder has
        copy = theirs.pop("lm_head.weight", theirs["model.embed_tokens.weight"])
        assert torch.equal(copy, theirs["model.embed_tokens.weight"])
    unlike = [key for key in mine.names() if key in theirs and not torch.equal(mine.tensor(key), theirs[key])]
    return [f"{name}: {key} on export" for key in {*unlike, *(mine.names() ^ theirs.keys())}]


@pytest.mark.parametrize(
    ("job", "names"),
    [(Job(tp=2, pp=2, first_stage=1), (*DENSE, *MIXTURES)), (Job(tp=2, ep=2, etp=1), MIXTURES)],
    ids=lambda value: str(value) if isinstance(value, Job) else "",
)
def test_mbridge_converts_to_the_same_bits_both_ways(
    job: Job, names: tuple[str, ...], tmp_path: Path
) -> None:
    pytest.importorskip("mbridge")
    for name in names:
        save_model(name, tmp_path / "models" / name)
    found = run_ranks(
        convert_twice, job.world_size, tmp_path, job, names, tmp_path / "models", tmp_path / "out"
    )
    assert found == [[] for _ in range(job.world_size)]
