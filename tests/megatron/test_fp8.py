"""Each recipe's numbers are those of its definition, written out in fp64 with a list of all FP8 numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hpt_mega.megatron.fp8 import Operand, Role, Scaling, amax_of, product, scale_for

# recipe, format, role, contracted dimension -> (rows, columns) of a block; None: the whole tensor
BLOCKS: dict[tuple[str, Role, int], tuple[int, int] | None] = {
    ("tensorwise", "input", 1): None,
    ("tensorwise", "weight", 0): None,
    ("tensorwise", "gradient", 1): None,
    ("delayed", "input", 1): None,
    ("delayed", "gradient", 0): None,
    ("blockwise", "input", 1): (1, 128),
    ("blockwise", "input", 0): (128, 1),
    ("blockwise", "gradient", 1): (1, 128),
    ("blockwise", "gradient", 0): (128, 1),
    ("blockwise", "weight", 1): (128, 128),
    ("blockwise", "weight", 0): (128, 128),
    ("mxfp8", "input", 1): (1, 32),
    ("mxfp8", "weight", 1): (1, 32),
    ("mxfp8", "weight", 0): (32, 1),
    ("mxfp8", "gradient", 0): (32, 1),
}
SIZES = [(131, 176), (35, 80)]  # short last blocks both ways
EMPTY = [(0, 80), (80, 0)]  # an expert without tokens


def fp8_numbers(exponent_bits: int, mantissa_bits: int, bias: int, largest: float) -> Tensor:
    """All finite numbers of a format from its definition, ascending."""
    positive = []
    for exponent, mantissa in itertools.product(range(2**exponent_bits), range(2**mantissa_bits)):
        fraction = mantissa / 2**mantissa_bits
        value = 2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction)
        if value <= largest:
            positive.append(value)
    return torch.tensor(sorted({*positive, *(-v for v in positive)}), dtype=torch.float64)


NUMBERS = {"e4m3": fp8_numbers(4, 3, 7, 448.0), "e5m2": fp8_numbers(5, 2, 15, 57344.0)}
LARGEST = {"e4m3": 448.0, "e5m2": 57344.0}


def nearest(x: Tensor, numbers: Tensor) -> Tensor:
    """The closest of the numbers; between two equally close ones, the one of even mantissa."""
    above = torch.searchsorted(numbers, x.contiguous()).clamp(1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    tie = (x - low) == (high - x)
    even = (above - 1 - len(numbers) // 2) % 2 == 0  # counted from zero
    take_low = torch.where(tie, even, (x - low) < (high - x))
    return torch.where(take_low, low, high)


def given_scale(recipe: str, amax: float, largest: float) -> float:
    if amax == 0:
        return 1.0
    if recipe == "blockwise":
        return 2.0 ** math.floor(math.log2(largest / amax))
    if recipe == "mxfp8":  # the stored exponent is ceil(log2(amax / largest)); the scale is its inverse
        return 2.0 ** -math.ceil(math.log2(amax / largest))
    return float(torch.tensor(largest) / torch.tensor(amax, dtype=torch.float32))


def blocks_of(shape: torch.Size, block: tuple[int, int] | None) -> Iterator[tuple[slice, slice]]:
    rows, columns = block or shape
    for top, left in itertools.product(range(0, shape[0], rows), range(0, shape[1], columns)):
        yield slice(top, top + rows), slice(left, left + columns)


def reference(x: Tensor, recipe: str, number_format: str, block: tuple[int, int] | None) -> Tensor:
    out = torch.empty_like(x, dtype=torch.float64)
    for rows, columns in blocks_of(x.shape, block):
        part = x[rows, columns].double()
        scale = given_scale(recipe, float(part.abs().max()), LARGEST[number_format])
        scaled = (part * scale).float().double() if block is None else part * scale  # fp32, as the kernels
        out[rows, columns] = nearest(scaled, NUMBERS[number_format]) / scale
    return out


def sample(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes over many binades, an outlier, and a block of zeros."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns, generator=generator)
    x *= torch.exp(2 * torch.randn(rows, columns, generator=generator))
    x[rows // 2, columns // 3] = 3e3
    x[: min(rows, 32), 32:64] = 0
    return x.to(dtype)


def own_scale(recipe: str, x: Tensor, dtype: torch.dtype) -> float | None:
    return float(scale_for(amax_of(x), dtype)) if recipe == "delayed" else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number_format", ["e4m3", "hybrid"])
@pytest.mark.parametrize(("recipe", "role", "contracted"), BLOCKS)
def test_an_operand_holds_the_numbers_of_the_recipes_definition(
    recipe: str, role: Role, contracted: int, number_format: str, dtype: torch.dtype
) -> None:
    scaling = Scaling(recipe, number_format)
    numbers = "e5m2" if number_format == "hybrid" and role == "gradient" else "e4m3"
    for size in SIZES:
        x = sample(*size, dtype)
        found = scaling.quantise(x, role, contracted, own_scale(recipe, x, scaling.dtype(role)))
        expected = reference(x, recipe, numbers, BLOCKS[recipe, role, contracted])
        torch.testing.assert_close(found.values.double() * found.scale, expected, rtol=1e-6, atol=0)
        assert not torch.equal(found.values.double() * found.scale, x.double())


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("contracted", [0, 1])
def test_an_expert_without_tokens_has_empty_operands(recipe: str, contracted: int) -> None:
    for size in EMPTY:
        x = torch.zeros(size)
        found = Scaling(recipe, "e4m3").quantise(
            x, "input", contracted, own_scale(recipe, x, torch.float8_e4m3fn)
        )
        assert found.values.shape == x.shape


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_a_product_is_that_of_the_reference_operands(recipe: str) -> None:
    x, w = sample(35, 176, torch.float32), 0.02 * sample(80, 176, torch.float32)
    scaling = Scaling(recipe, "e4m3")
    rows = scaling.quantise(x, "input", 1, own_scale(recipe, x, torch.float8_e4m3fn))
    weight = scaling.quantise(w, "weight", 1, own_scale(recipe, w, torch.float8_e4m3fn))
    found = product(rows, Operand(weight.values.t(), weight.scale)).double()
    block = {"blockwise": (1, 128), "mxfp8": (1, 32)}.get(recipe)
    weight_block = {"blockwise": (128, 128), "mxfp8": (1, 32)}.get(recipe)
    expected = reference(x, recipe, "e4m3", block) @ reference(w, recipe, "e4m3", weight_block).t()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    exact = x.double() @ w.double().t()
    error = float((found - exact).norm() / exact.norm())
    assert 0.005 < error < 0.05  # three bits of mantissa, and no worse


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-30, 3e38])
def test_extreme_magnitudes_stay_finite(recipe: str, value: float) -> None:
    x = torch.full((32, 32), value)
    found = Scaling(recipe, "e4m3").quantise(x, "input", 1, own_scale(recipe, x, torch.float8_e4m3fn))
    whole = found.values.double() * found.scale
    assert torch.isfinite(whole).all()
    torch.testing.assert_close(whole, x.double(), rtol=0.04, atol=1e-38)


@pytest.mark.parametrize("recipe", ["blockwise", "mxfp8"])
def test_not_a_number_is_passed_on(recipe: str) -> None:
    x = torch.ones(32, 64)
    x[3, 40] = math.nan
    found = Scaling(recipe, "e4m3").quantise(x, "input", 1).values
    assert torch.isnan(found[3, 40]) and torch.isfinite(found[4]).all()


def test_what_a_stale_scale_cannot_hold_becomes_the_largest_number() -> None:
    x = torch.tensor([[1.0, 100.0, -100.0]])
    found = Scaling("delayed", "e4m3").quantise(x, "input", 1, scale=448.0)
    torch.testing.assert_close(found.values * found.scale, torch.tensor([[1.0, 1.0, -1.0]]))
