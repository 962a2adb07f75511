"""The scaling rules of Transformer Engine's FP8 recipes, as quantise-dequantise in torch. No Megatron here.

Which layers use them, and where delayed scaling keeps its history, is in precision.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

RECIPES = ("delayed", "tensorwise", "blockwise", "mxfp8")
FORMATS = ("e4m3", "hybrid")  # hybrid: gradients in e5m2
AMAX_ALGORITHMS = ("max", "most_recent")
BLOCK, MX_BLOCK = 128, 32

Role = Literal["input", "weight", "gradient"]


class Operand(NamedTuple):
    """A factor of a matrix product after FP8: `values` times `scale` is what the product sees.

    values are exact in the input's dtype (an FP8 number times a power of two). A whole tensor's scale need
    not be a power of two and stays apart, as it does in the GPU's kernels, which apply it to the result.
    """

    values: Tensor
    scale: float


def align_of(recipe: str) -> int:
    """What every dimension of an FP8 product must be a multiple of: Transformer Engine refuses others."""
    return MX_BLOCK if recipe == "mxfp8" else 16


@dataclass(frozen=True)
class Scaling:
    """A recipe's rules. `recipe` is one of RECIPES, `format` one of FORMATS.

    Sources: Transformer Engine 2.20 (common/recipe, common/cast); DeepSeek-V3, arXiv 2412.19437, for
    blockwise; the OCP microscaling specification 1.0 for mxfp8.
    """

    recipe: str
    format: str

    def dtype(self, role: Role) -> torch.dtype:
        return torch.float8_e5m2 if self.format == "hybrid" and role == "gradient" else torch.float8_e4m3fn

    @property
    def is_whole_tensor(self) -> bool:
        """Whether one scale serves a tensor, so that it and its transpose hold the same numbers."""
        return self.recipe in ("delayed", "tensorwise")

    def is_symmetric(self, role: Role) -> bool:
        """Whether `quantise` gives the same for either contracted dimension."""
        return self.is_whole_tensor or (self.recipe == "blockwise" and role == "weight")

    def quantise(self, x: Tensor, role: Role, contracted: int, scale: float | None = None) -> Operand:
        """The matrix x [M, K] as an operand of a product that sums over dimension `contracted` (0 or 1).

        scale: what x is multiplied by before the cast; delayed scaling gives it, the others find their own.
        """
        dtype = self.dtype(role)
        if self.is_whole_tensor:
            if scale is None:
                scale = float(scale_for(amax_of(x), dtype))
            return Operand(_cast(x.float() * scale, dtype).to(x.dtype), 1.0 / scale)
        if self.recipe == "blockwise" and role == "weight":
            return Operand(_square_blocks(x, dtype), 1.0)
        if contracted == 0:
            return Operand(self._vectors(x.t(), dtype).t(), 1.0)
        return Operand(self._vectors(x, dtype), 1.0)

    def _vectors(self, x_MK: Tensor, dtype: torch.dtype) -> Tensor:
        """Blocks of consecutive numbers along the last dimension, each with its scale; the last one may be
        short, as it is for Transformer Engine's blockwise kernels."""
        rows, width = x_MK.shape  # no rows: an expert without tokens
        size = BLOCK if self.recipe == "blockwise" else MX_BLOCK
        count = math.ceil(width / size)
        tiles = pad(x_MK.float(), (0, -width % size)).reshape(rows, count, size)
        amax = tiles.abs().amax(-1, keepdim=True)
        if self.recipe == "blockwise":
            scale = power_of_two_below(scale_for(amax, dtype))
        else:
            scale = e8m0_scale_for(amax, dtype)
        return _round_trip(tiles, scale, dtype, x_MK.dtype).reshape(rows, count * size)[:, :width]


def product(a_MK: Operand, b_KN: Operand) -> Tensor:
    """[M, N]; sums in fp32 (the GPU's FP8 units keep fewer bits between partial sums)."""
    scale = a_MK.scale * b_KN.scale
    out = a_MK.values @ b_KN.values
    return out if scale == 1.0 else out * scale


def amax_of(x: Tensor) -> Tensor:
    """The largest magnitude in fp32; 0 for an empty tensor."""
    return x.abs().amax().float() if x.numel() else torch.zeros((), device=x.device)


def scale_for(amax: Tensor, dtype: torch.dtype, margin: int = 0) -> Tensor:
    """What maps amax to the largest number of dtype, over 2^margin; 1 for amax 0 or not finite.

    Where the quotient overflows, the largest fp32 number.
    """
    scale = torch.finfo(dtype).max * 2.0**-margin / amax
    scale = scale.clamp(max=torch.finfo(torch.float32).max)
    return torch.where(torch.isfinite(amax) & (amax > 0), scale, torch.ones_like(scale))


def power_of_two_below(scale: Tensor) -> Tensor:
    """fp32 scale rounded down to a power of two: its mantissa is dropped."""
    return (scale.view(torch.int32) & -0x800000).view(torch.float32)


def e8m0_scale_for(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The power of two by which a block is multiplied; its inverse is the E8M0 number stored with it.

    The stored exponent is that of amax / max(dtype), rounded up: no number of the block overflows.
    """
    bits = (amax * (1.0 / torch.finfo(dtype).max)).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    up = (mantissa > 0) & (exponent < 254) & ~((exponent == 0) & (mantissa <= 0x400000))
    stored = (exponent + up.int()).clamp(max=254)
    scale = torch.ldexp(torch.ones_like(amax), 127 - stored)
    return torch.where(torch.isnan(amax), amax, scale)


def _square_blocks(x_MK: Tensor, dtype: torch.dtype) -> Tensor:
    rows, width = x_MK.shape
    padded = pad(x_MK.float(), (0, -width % BLOCK, 0, -rows % BLOCK))
    tiles = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scale = power_of_two_below(scale_for(tiles.abs().amax((1, 3), keepdim=True), dtype))
    return _round_trip(tiles, scale, dtype, x_MK.dtype).view(padded.shape)[:rows, :width]


def _round_trip(tiles: Tensor, scale: Tensor, dtype: torch.dtype, into: torch.dtype) -> Tensor:
    return _cast(tiles * scale, dtype).to(into) * (1.0 / scale).to(into)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest FP8 number; what lies beyond the largest one becomes it (torch's cast gives NaN)."""
    limit = torch.finfo(dtype).max
    return x.clamp(-limit, limit).to(dtype)
