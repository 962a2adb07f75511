"""How Hugging Face tensors make up one Megatron parameter, and how tensor-parallel ranks share it.

Pure tensor arithmetic, bit-exact both ways: split(fuse(x)) is x, and so is merge of all ranks' shard(x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpt_mega.resharding.mapping.shape import LatentAttention, ModelShape


@dataclass(frozen=True)
class Piece:
    """What one rank holds of a Hugging Face tensor, as a view: a slice along `dim` that begins at `start`."""

    tensor: int  # position among the row's Hugging Face tensors
    dim: int
    start: int
    part: Tensor


class Fusion:
    """One tensor, whole on every rank (norms, routers); the base of the ways to fuse and cut.

    `dim` is the dimension of the fused tensor that ranks share, None where each holds all of it. `blocks`
    equal parts of that dimension are shared one by one, so a rank's part has as many pieces.
    """

    dim: int | None = None
    blocks = 1

    def fuse(self, tensors: Sequence[Tensor], shape: ModelShape) -> Tensor:
        """The whole Megatron parameter, from the Hugging Face tensors of its row in order."""
        blocks = self.fused_blocks(tensors, shape)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=self.dim or 0)

    def fused_blocks(self, tensors: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        """The whole Megatron parameter as its blocks, which are no copies where they are the tensors."""
        return [tensors[0]]

    def fused_shape(self, shapes: Iterable[Sequence[int]]) -> tuple[int, ...]:
        """The shape of fuse(), from those of the Hugging Face tensors, which dimension 0 puts together."""
        first, *others = shapes
        return (first[0] + sum(other[0] for other in others), *first[1:])

    def views(self, whole: Tensor, shape: ModelShape) -> list[Tensor]:
        """The Hugging Face tensors as views of the whole Megatron parameter.

        Read in row order each is its tensor; where others lie between its rows it has them in groups, along
        a dimension put before its own.
        """
        return [whole]

    def split(self, whole: Tensor, shape: ModelShape) -> list[Tensor]:
        """The Hugging Face tensors, from the whole Megatron parameter."""
        return self.views(whole, shape)

    def shard(self, tensors: Sequence[Tensor], shape: ModelShape, rank: int, size: int) -> Tensor:
        """The part of tensor-parallel rank `rank` of `size`, from whole Hugging Face tensors."""
        pieces = [piece for _, piece in self.pieces(self.fused_blocks(tensors, shape), rank, size)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=self.dim or 0)

    def merge(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        """The Hugging Face tensors, from the parts of all ranks in order."""
        return self.split(self.join(shards), shape)

    def join(self, shards: Sequence[Tensor]) -> Tensor:
        """The whole Megatron parameter, from the parts of all ranks in order."""
        if self.dim is None or len(shards) == 1:
            return shards[0]
        cut = [shard.chunk(self.blocks, self.dim) for shard in shards]
        return torch.cat([pieces[block] for block in range(self.blocks) for pieces in cut], dim=self.dim)

    def contribution(self, part: Tensor, shape: ModelShape, rank: int) -> list[Piece]:
        """What a rank's part gives to each Hugging Face tensor; the first rank gives what all hold."""
        if self.dim is None:
            return [Piece(0, 0, 0, part)] if rank == 0 else []
        local = self.split(part, shape)
        return [Piece(i, self.dim, rank * t.shape[self.dim], t) for i, t in enumerate(local)]

    def pieces(self, blocks: Sequence[Tensor], rank: int, size: int) -> list[tuple[int, Tensor]]:
        """A rank's pieces of the whole's blocks, as views, with where each begins in the whole along `dim`.

        Raises ValueError where the dimension has no `size` equal parts.
        """
        if self.dim is None:
            return [(0, blocks[0])]
        length = blocks[0].shape[self.dim]
        if length % size:
            each = f"each of {len(blocks)} blocks of " if len(blocks) > 1 else ""
            raise ValueError(
                f"{each}{list(blocks[0].shape)} cannot be cut into {size} equal parts along "
                f"dimension {self.dim}"
            )
        part = length // size
        return [
            (number * length + rank * part, block.narrow(self.dim, rank * part, part))
            for number, block in enumerate(blocks)
        ]


class Replicated(Fusion):
    """The same tensor on every rank: norms."""


class Split(Fusion):
    """One tensor, cut along a dimension: 0 for a column-parallel layer's outputs, 1 for a row-parallel one's
    inputs."""

    def __init__(self, dim: int) -> None:
        self.dim = dim


class LatentDown(Split):
    """A projection down to a latent vector: cut by rows under megatron-core's own spec, whole on every rank
    under Transformer Engine's."""

    def __init__(self, rows: Callable[[LatentAttention], int]) -> None:
        super().__init__(0)
        self._rows = rows

    def merge(self, shards: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        return [shards[0]] if self._is_whole(shards[0], shape) else super().merge(shards, shape)

    def contribution(self, part: Tensor, shape: ModelShape, rank: int) -> list[Piece]:
        if self._is_whole(part, shape):
            return [Piece(0, 0, 0, part)] if rank == 0 else []
        return super().contribution(part, shape, rank)

    def _is_whole(self, part: Tensor, shape: ModelShape) -> bool:
        return shape.latent is not None and len(part) == self._rows(shape.latent)


class Vocabulary(Fusion):
    """Rows of the vocabulary, padded with zeros until every rank holds equally many."""

    dim = 0

    def views(self, whole: Tensor, shape: ModelShape) -> list[Tensor]:
        return [whole[: shape.vocab_size]]

    def contribution(self, part: Tensor, shape: ModelShape, rank: int) -> list[Piece]:
        start = rank * len(part)
        return [Piece(0, 0, start, part[: max(0, shape.vocab_size - start)])]

    def pieces(self, blocks: Sequence[Tensor], rank: int, size: int) -> list[tuple[int, Tensor]]:
        (whole,) = blocks
        rows = padded_vocab_size(len(whole), size) // size
        part = whole[rank * rows : (rank + 1) * rows]
        if len(part) < rows:
            part = torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])
        return [(rank * rows, part)]


class QueryKeyValue(Fusion):
    """Query, key and value (weights or biases) interleaved by query group: [q.. q k v] for each group."""

    dim = 0

    def fused_blocks(self, tensors: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        by_group = [tensor.unflatten(0, (shape.num_query_groups, -1)) for tensor in tensors]
        return [torch.cat(by_group, dim=1).flatten(0, 1)]

    def views(self, whole: Tensor, shape: ModelShape) -> list[Tensor]:
        sizes = self._sizes(shape)
        return list(whole.unflatten(0, (-1, sum(sizes))).split(sizes, dim=1))

    def split(self, whole: Tensor, shape: ModelShape) -> list[Tensor]:
        return [view.flatten(0, 1) for view in self.views(whole, shape)]

    def contribution(self, part: Tensor, shape: ModelShape, rank: int) -> list[Piece]:
        """A piece a group: together, a tensor's rows are no view of the part."""
        sizes = self._sizes(shape)
        by_group = part.unflatten(0, (-1, sum(sizes)))
        return [
            Piece(tensor, 0, (rank * len(by_group) + number) * rows.shape[0], rows)
            for number, group in enumerate(by_group)
            for tensor, rows in enumerate(group.split(sizes))
        ]

    @staticmethod
    def _sizes(shape: ModelShape) -> list[int]:
        """Rows of query, key and value in a group."""
        heads = shape.num_attention_heads // shape.num_query_groups
        return [heads * shape.head_dim, shape.head_dim, shape.head_dim]


class GateUp(Fusion):
    """A gated layer's two projections: each rank holds its rows of the gate, then its rows of the other."""

    dim = 0
    blocks = 2

    def fused_blocks(self, tensors: Sequence[Tensor], shape: ModelShape) -> list[Tensor]:
        return list(tensors)

    def views(self, whole: Tensor, shape: ModelShape) -> list[Tensor]:
        return list(whole.chunk(2))


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The vocabulary rounded up so that every tensor-parallel rank holds equally many rows."""
    return -(-vocab_size // tp_size) * tp_size
