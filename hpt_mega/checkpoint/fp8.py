"""Dequantisation of FP8 weights with a scale a block, as DeepSeek-V3 is published. hf.py reads them."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE_SUFFIX = "_scale_inv"


def dequantize(weight_OI: Tensor, scale_inv: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """weight[o, i] * scale_inv[o // block[0], i // block[1]] in fp32, rounded once to `dtype`; [O, I].

    The last block of a row or column may be smaller. Raises ValueError where the scales' shape is another.
    """
    rows, columns = weight_OI.shape
    expected = [-(-rows // block[0]), -(-columns // block[1])]
    if list(scale_inv.shape) != expected:
        raise ValueError(
            f"scales of {list(scale_inv.shape)} given for a weight of {[rows, columns]} in blocks of "
            f"{list(block)}, expected {expected}; set quantization_config.weight_block_size in config.json"
        )
    out = torch.empty(rows, columns, dtype=dtype)
    scale_by_column = scale_inv.float().repeat_interleave(block[1], dim=1)[:, :columns]
    for number, begin in enumerate(range(0, rows, block[0])):  # row by row of blocks: little memory
        part = slice(begin, begin + block[0])
        out[part] = (weight_OI[part].float() * scale_by_column[number]).to(dtype)
    return out
