"""The CPU's core attention beside torch's own with repeated keys."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hpt_mega.megatron.attention import (
    PackedRow,
    _short_bf16_attention,
    causal_attention,
    packed_attention,
)
from hpt_mega.megatron.variants import WindowAttention

LENGTH, BATCH, GROUPS, CHANNELS = 13, 3, 2, 5


def inputs(heads: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(heads)
    query, key, value = (
        torch.randn(LENGTH, BATCH, n, CHANNELS, generator=generator).to(dtype)
        for n in (heads, GROUPS, GROUPS)
    )
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def expected_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[S, B, N * D] in fp64 with every group's keys repeated for its heads."""
    per_group = query.shape[2] // key.shape[2]
    query_BNSD = query.double().permute(1, 2, 0, 3)
    key_BNSD, value_BNSD = (
        x.double().permute(1, 2, 0, 3).repeat_interleave(per_group, dim=1) for x in (key, value)
    )
    out = scaled_dot_product_attention(query_BNSD, key_BNSD, value_BNSD, is_causal=True)
    return out.permute(2, 0, 1, 3).flatten(2)


def outputs_and_gradients(out: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    seed = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [out, *torch.autograd.grad((out.double() * seed).sum(), leaves)]


@pytest.mark.parametrize("heads", [2, 6])
def test_causal_attention_and_its_gradient_are_torchs_with_repeated_keys(heads: int) -> None:
    leaves = inputs(heads)
    expected = outputs_and_gradients(expected_attention(*leaves), leaves)
    for found, right in zip(outputs_and_gradients(causal_attention(*leaves), leaves), expected, strict=True):
        torch.testing.assert_close(found.double(), right.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", [2, 6])
def test_the_plain_products_are_the_same_function(heads: int) -> None:
    """In fp64, where round-off cannot hide a mistake."""
    leaves = inputs(heads, torch.float64)
    expected = outputs_and_gradients(expected_attention(*leaves), leaves)
    found = outputs_and_gradients(_short_bf16_attention(*leaves), leaves)
    for ours, right in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)


def test_bf16_stays_within_its_round_off() -> None:
    leaves = inputs(6, torch.bfloat16)
    found = causal_attention(*leaves)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), expected_attention(*leaves), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kernel", [causal_attention, _short_bf16_attention])
def test_packed_segments_attend_as_if_each_were_alone(kernel: Any) -> None:
    query, key, value = (x[:, 0] for x in inputs(6, torch.float64))
    bounds = [0, 4, 5, LENGTH]
    leaves = (query, key, value)
    apart = torch.cat(
        [expected_attention(*(x[a:b, None] for x in leaves))[:, 0] for a, b in pairwise(bounds)]
    )
    found = packed_attention(kernel, query, key, value, bounds, [0, 1, 2])
    for ours, right in zip(
        outputs_and_gradients(found, leaves), outputs_and_gradients(apart, leaves), strict=True
    ):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", [causal_attention, _short_bf16_attention])
def test_responses_that_share_a_prompt_attend_as_if_each_stood_behind_its_own(kernel: Any) -> None:
    leaves = query, key, value = tuple(x[:, 0] for x in inputs(6, torch.float64))
    # an answer to the second prompt stands before one to the first; the last sequence is alone
    bounds, prompts = [0, 3, 5, 6, 8, 11, LENGTH], [0, 0, 2, 2, 0, 5]
    expected = torch.empty(LENGTH, query.shape[1] * CHANNELS, dtype=torch.float64)
    segments = [list(range(a, b)) for a, b in pairwise(bounds)]
    for segment, prompt in zip(segments, prompts, strict=True):
        before = [] if segments[prompt] == segment else segments[prompt]
        whole = [x[[*before, *segment], None] for x in leaves]
        expected[segment] = expected_attention(*whole)[len(before) :, 0]
    found = packed_attention(kernel, query, key, value, bounds, prompts)
    for ours, right in zip(
        outputs_and_gradients(found, leaves), outputs_and_gradients(expected, leaves), strict=True
    ):
        torch.testing.assert_close(ours, right, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernel", [causal_attention, _short_bf16_attention])
def test_queries_that_come_last_see_all_keys_before_them(kernel: Any) -> None:
    query, key, value = inputs(6, torch.float64)
    whole = expected_attention(query, key, value)
    torch.testing.assert_close(kernel(query[-5:], key, value), whole[-5:], rtol=1e-10, atol=1e-10)


def test_a_window_of_packed_segments_is_that_of_each_alone() -> None:
    query, key, value = (x[:, 0] for x in inputs(2, torch.float64))
    bounds, window = [0, 6, LENGTH], 3
    attention = WindowAttention(SimpleNamespace(context_parallel_size=1, window_size=(window - 1, 0)), 1)
    row = PackedRow(cu_seqlens_q=torch.tensor(bounds), prompts=[0, 1])
    found = attention(query, key, value, packed_seq_params=row)
    for at in range(LENGTH):
        first = max(at - window + 1, 0 if at < 6 else 6)
        for head in range(2):
            scores = key[first : at + 1, head] @ query[at, head] * CHANNELS**-0.5
            expected = scores.softmax(0) @ value[first : at + 1, head]
            torch.testing.assert_close(found[at].view(2, -1)[head], expected, rtol=1e-9, atol=1e-9)
