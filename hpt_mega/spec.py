"""A tensor without its data, and the codes that files and plans give dtypes by."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# safetensors' codes, in the order its package sorts a file's tensors by, last first
DTYPE_CODES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
CODED_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class Spec:
    """A tensor without its data."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: Tensor) -> Spec:
        return cls(tensor.dtype, tuple(tensor.shape))

    def fits(self, tensor: Tensor) -> bool:
        """Does the tensor hold this, whether or not its rows are in groups along a dimension before them?"""
        groups = 1 + tensor.dim() - len(self.shape)
        sizes = (math.prod(tensor.shape[:groups]), *tensor.shape[groups:]) if self.shape else tensor.shape
        return groups > 0 and (tensor.dtype, tuple(sizes)) == (self.dtype, self.shape)
