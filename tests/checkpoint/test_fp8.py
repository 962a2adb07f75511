"""Dequantisation of FP8 weights agrees with a loop over their elements; folders of them convert."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hpt_mega.checkpoint.convert import hf_to_megatron, megatron_to_hf
from hpt_mega.checkpoint.fp8 import dequantize
from hpt_mega.checkpoint.hf import HFCheckpoint
from hpt_mega.checkpoint.layout import TargetLayout
from tests.checkpoint.families import save_model


@pytest.mark.parametrize("sizes", [(7, 11), (8, 12), (3, 4), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_element_is_its_code_times_its_blocks_scale(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = (3, 4)
    weight = (10 * torch.randn(sizes)).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-sizes[0] // block[0]), -(-sizes[1] // block[1]))
    expected = torch.empty(sizes, dtype=dtype)
    for row in range(sizes[0]):
        for column in range(sizes[1]):
            factor = scale[row // block[0], column // block[1]]
            expected[row, column] = (weight[row, column].float() * factor).to(dtype)
    assert torch.equal(dequantize(weight, scale, block, dtype), expected)


def test_scales_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="weight_block_size"):
        dequantize(torch.zeros(6, 8).to(torch.float8_e4m3fn), torch.ones(2, 3), (3, 4), torch.bfloat16)


def test_a_quantised_folder_converts_to_its_dequantised_self(tmp_path: Path) -> None:
    save_model("deepseek_v3", tmp_path / "hf", torch.bfloat16)
    path = tmp_path / "hf" / "model.safetensors"
    plain, tensors = load_file(path), {}
    for name, tensor in plain.items():
        if name.endswith("_proj.weight"):
            scale = 0.5 + torch.rand(-(-tensor.shape[0] // 16), -(-tensor.shape[1] // 32))
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale
            plain[name] = dequantize(tensors[name], scale, (16, 32), torch.bfloat16)
        else:
            tensors[name] = tensor
    save_file(tensors, path)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 32]}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", TargetLayout(tp=2), lambda done, total: None)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", None, lambda done, total: None)
    back = HFCheckpoint(tmp_path / "back")
    assert "quantization_config" not in back.config and back.dtype is torch.bfloat16
    assert set(back.names()) == set(plain)
    for name, tensor in plain.items():
        assert torch.equal(back.tensor(name), tensor)
