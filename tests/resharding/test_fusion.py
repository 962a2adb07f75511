"""The laws of each way to fuse and cut tensors, for any sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hpt_mega.resharding.mapping.fusion import (
    Fusion,
    GateUp,
    LatentDown,
    QueryKeyValue,
    Replicated,
    Split,
    Vocabulary,
    padded_vocab_size,
)
from hpt_mega.resharding.mapping.shape import LatentAttention, ModelShape

SHAPE = ModelShape(
    num_layers=1,
    hidden_size=7,
    num_attention_heads=1,
    num_query_groups=1,
    head_dim=1,
    ffn_hidden_size=1,
    vocab_size=1,
    max_position_embeddings=1,
    norm_epsilon=1e-5,
    rotary_base=1e4,
    tied=False,
)
SIZES = st.integers(1, 5)


def distinct(*sizes: int, begin: int = 1) -> Tensor:
    return torch.arange(begin, begin + int(torch.tensor(sizes).prod())).view(sizes)


def several(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Tensors of these shapes in which no number comes twice, and none is the padding's."""
    tensors, begin = [], 1
    for sizes in shapes:
        tensors.append(distinct(*sizes, begin=begin))
        begin += tensors[-1].numel()
    return tensors


def assert_laws(fusion: Fusion, tensors: list[Tensor], shape: ModelShape, size: int) -> list[Tensor]:
    shards = [fusion.shard(tensors, shape, rank, size) for rank in range(size)]
    for back in (fusion.split(fusion.fuse(tensors, shape), shape), fusion.merge(shards, shape)):
        assert len(back) == len(tensors)
        assert all(torch.equal(*pair) for pair in zip(back, tensors, strict=True))
    whole = fusion.join(shards)
    for rank in range(size):  # where a piece says it begins, it is
        for start, piece in fusion.pieces(fusion.fused_blocks(tensors, shape), rank, size):
            if fusion.dim is not None:
                assert torch.equal(whole.narrow(fusion.dim, start, piece.shape[fusion.dim]), piece)
    return shards


@given(size=SIZES, rows=SIZES, columns=SIZES)
def test_split_and_replicated(size: int, rows: int, columns: int) -> None:
    assert_laws(Replicated(), several((rows, columns)), SHAPE, size)
    assert_laws(Split(0), several((rows * size, columns)), SHAPE, size)
    assert_laws(Split(1), several((rows, columns * size)), SHAPE, size)


@given(size=SIZES, vocabulary=st.integers(1, 40), columns=SIZES)
def test_vocabulary_is_padded_with_zeros_to_equal_shards(size: int, vocabulary: int, columns: int) -> None:
    shape = replace(SHAPE, vocab_size=vocabulary)
    shards = assert_laws(Vocabulary(), several((vocabulary, columns)), shape, size)
    assert {len(shard) for shard in shards} == {padded_vocab_size(vocabulary, size) // size}
    assert not torch.cat(shards)[vocabulary:].any()


@given(size=SIZES, groups=SIZES, per_group=SIZES, head_dim=SIZES, columns=SIZES, bias=st.booleans())
def test_query_key_value_holds_whole_groups(
    size: int, groups: int, per_group: int, head_dim: int, columns: int, bias: bool
) -> None:
    groups *= size
    shape = replace(SHAPE, num_query_groups=groups, num_attention_heads=groups * per_group, head_dim=head_dim)
    tail = () if bias else (columns,)
    tensors = several((shape.query_size, *tail), (shape.key_size, *tail), (shape.key_size, *tail))
    shards = assert_laws(QueryKeyValue(), tensors, shape, size)
    first = [tensor.unflatten(0, (groups, -1))[0] for tensor in tensors]
    assert torch.equal(shards[0][: (per_group + 2) * head_dim], torch.cat(first))


@given(size=SIZES, rows=SIZES, columns=SIZES)
def test_gate_up_holds_a_part_of_each(size: int, rows: int, columns: int) -> None:
    tensors = several((rows * size, columns), (rows * size, columns))
    shards = assert_laws(GateUp(), tensors, SHAPE, size)
    for rank, shard in enumerate(shards):
        parts = [tensor[rank * rows : (rank + 1) * rows] for tensor in tensors]
        assert torch.equal(shard, torch.cat(parts))


@given(size=SIZES, rows=SIZES)
def test_a_projection_to_latents_merges_from_parts_and_from_whole_copies(size: int, rows: int) -> None:
    latent = LatentAttention(rows * size, 1, 1, 1, 1, None)
    fusion, shape = LatentDown(lambda latent: latent.q_lora_rank), replace(SHAPE, latent=latent)
    tensors = several((rows * size, 3))
    assert_laws(fusion, tensors, shape, size)
    assert torch.equal(fusion.merge(tensors * size, shape)[0], tensors[0])


def test_parts_that_cannot_be_equal_are_refused() -> None:
    with pytest.raises(ValueError, match="2 equal parts along dimension 1"):
        Split(1).shard(several((4, 5)), SHAPE, 0, 2)
    with pytest.raises(ValueError, match="each of 2 blocks of"):
        GateUp().shard(several((3, 5), (3, 5)), SHAPE, 0, 2)
