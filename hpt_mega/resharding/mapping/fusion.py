"""How Hugging Face tensors make up one Megatron parameter, and how tensor-parallel ranks share it.

Pure tensor arithmetic, bit-exact both ways: merge(shard(x, r) for every rank r) is x. Shards are views where
they can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hpt_mega.resharding.mapping.shape import ModelShape


class Fusion(Protocol):
    """One way of fusing and splitting."""

    def shard(self, tensors: Sequence[Tensor], shape: ModelShape, rank: int, size: int) -> Tensor:
        """The part of tensor-parallel rank `rank` of `size`, from whole Hugging Face tensors."""
        ...

    def merge(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        """The Hugging Face tensors, from the parts of all ranks in order."""
        ...


class Replicated:
    """The same tensor on every rank: norms."""

    def shard(self, tensors: Sequence[Tensor], shape: ModelShape, rank: int, size: int) -> Tensor:
        return tensors[0]

    def merge(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        return [shards[0]]


class Split:
    """One tensor, cut along a dimension: 0 for a column-parallel layer's outputs, 1 for a row-parallel one's
    inputs."""

    def __init__(self, dim: int) -> None:
        self._dim = dim

    def shard(self, tensors: Sequence[Tensor], shape: ModelShape, rank: int, size: int) -> Tensor:
        return _part(tensors[0], self._dim, rank, size)

    def merge(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        return [torch.cat(list(shards), dim=self._dim)]


class Vocabulary:
    """Rows of the vocabulary, padded with zeros until every rank holds equally many."""

    def shard(self, tensors: Sequence[Tensor], shape: ModelShape, rank: int, size: int) -> Tensor:
        (weight_VH,) = tensors
        rows = padded_vocab_size(shape.vocab_size, size) // size
        part = weight_VH[rank * rows : (rank + 1) * rows]
        if len(part) == rows:
            return part
        return torch.cat([part, part.new_zeros(rows - len(part), part.shape[1])])

    def merge(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        return [torch.cat(list(shards))[: shape.vocab_size]]


class QueryKeyValue:
    """Query, key and value interleaved by query group: [q.. q k v] for each group, groups in order."""

    def shard(self, tensors: Sequence[Tensor], shape: ModelShape, rank: int, size: int) -> Tensor:
        groups = shape.num_query_groups
        parts = [_part(t.unflatten(0, (groups, -1)), 0, rank, size) for t in tensors]
        return torch.cat(parts, dim=1).flatten(0, 1)

    def merge(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        fused = torch.cat(list(shards)).unflatten(0, (shape.num_query_groups, -1))
        heads = shape.num_attention_heads // shape.num_query_groups
        sizes = [heads * shape.head_dim, shape.head_dim, shape.head_dim]
        return [part.flatten(0, 1) for part in fused.split(sizes, dim=1)]


class GateUp:
    """A gated layer's two projections: each rank holds its rows of the gate, then its rows of the other."""

    def shard(self, tensors: Sequence[Tensor], shape: ModelShape, rank: int, size: int) -> Tensor:
        return torch.cat([_part(tensor, 0, rank, size) for tensor in tensors])

    def merge(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        halves = [shard.chunk(2) for shard in shards]
        return [torch.cat([half[i] for half in halves]) for i in range(2)]


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The vocabulary rounded up so that every tensor-parallel rank holds equally many rows."""
    return -(-vocab_size // tp_size) * tp_size


def _part(tensor: Tensor, dim: int, rank: int, size: int) -> Tensor:
    length = tensor.shape[dim]
    if length % size:
        raise ValueError(f"{list(tensor.shape)} cannot be cut into {size} equal parts along dimension {dim}")
    return tensor.narrow(dim, rank * (length // size), length // size)
