"""Core attention of the local (CPU) layer spec, in place of megatron-core's unfused softmax.

TE brings its own on GPUs. Decoding from a cache is in decoding.py, other shapes are in variants.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hpt_mega.data.packing import context_places
from hpt_mega.megatron import cpu

cpu.install()

from megatron.core.packed_seq_params import PackedSeqParams  # noqa: E402
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region  # noqa: E402


@dataclass
class PackedRow(PackedSeqParams):
    """Megatron's description of a packed row, with what CoreAttention alone knows of."""

    prompts: list[int] = field(default_factory=list)  # MicroBatch.prompts


class CoreAttention(torch.nn.Module):
    """Causal attention over packed segments, or over right-padded sequences of one length."""

    def __init__(
        self, config: Any, layer_number: int, *args: Any, pg_collection: Any = None, **kwargs: Any
    ) -> None:
        super().__init__()
        self._context = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        packed_seq_params: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N * D]; packed: no B in any of them."""
        if packed_seq_params is not None:
            bounds, prompts = packed_seq_params.cu_seqlens_q.tolist(), packed_seq_params.prompts
            return packed_attention(self.attend, query, key, value, bounds, prompts, self._context)
        return self.attend(query, key, value)

    def attend(self, query_SBND: Tensor, key_LBGD: Tensor, value_LBGD: Tensor) -> Tensor:
        """The queries stand at the last S of the L positions, and see no later one."""
        return causal_attention(query_SBND, key_LBGD, value_LBGD)


def packed_attention(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    query_SND: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    bounds: list[int],
    prompts: list[int],
    context: dist.ProcessGroup | None = None,
) -> Tensor:
    """`attend` on each segment [bounds[k], bounds[k + 1]) of a row: [S, N * D].

    A segment sees segment prompts[k] before itself, where that is another one. With a context-parallel group,
    S are this rank's places of the row (context_places); keys and values are gathered from all of its ranks.
    """
    lengths = [end - start for start, end in pairwise(bounds)]
    if context is None:
        pieces = [(length, segment, length) for segment, length in enumerate(lengths)]
    else:
        rank, size = context.rank(), context.size()
        pieces = []  # queries; their segment; how much of it they see
        for segment, length in enumerate(lengths):
            chunk = length // (2 * size)
            pieces += [(chunk, segment, (number + 1) * chunk) for number in (rank, 2 * size - 1 - rank)]
        places = [context_places(bounds, rank, size) for rank in range(size)]
        order = torch.cat(places).argsort()
        key_SGD, value_SGD = (
            gather_from_sequence_parallel_region(x, group=context)[order] for x in (key_SGD, value_SGD)
        )
    queries = query_SND.split([count for count, _, _ in pieces])
    keys, values = key_SGD.split(lengths), value_SGD.split(lengths)

    def seen(parts: tuple[Tensor, ...], segment: int, count: int) -> Tensor:
        own, prompt = parts[segment][:count], prompts[segment]
        return (own if prompt == segment else torch.cat((parts[prompt], own)))[:, None]

    outputs = [
        attend(query[:, None], seen(keys, segment, count), seen(values, segment, count))
        for query, (_, segment, count) in zip(queries, pieces, strict=True)
    ]
    return torch.cat(outputs)[:, 0]


def causal_attention(query_SBND: Tensor, key_LBGD: Tensor, value_LBGD: Tensor) -> Tensor:
    """Grouped-query causal attention, [S, B, N, D] and [L, B, G, D] -> [S, B, N * D].

    The queries stand at the last S of the L positions.
    """
    if query_SBND.is_cpu and query_SBND.dtype is torch.bfloat16 and len(query_SBND) <= _SHORT:
        return _short_bf16_attention(query_SBND, key_LBGD, value_LBGD)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_LBGD, value_LBGD))
    earlier = key.shape[2] - query.shape[2]
    mask = None
    if earlier:
        mask = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(earlier)
    out_BNSD = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=not earlier, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out_BNSD.permute(2, 0, 1, 3).flatten(2)


_SHORT = 512  # the fused CPU kernel's bf16 backward is about 3x slower than plain products below this


def _short_bf16_attention(query_SBND: Tensor, key_LBGD: Tensor, value_LBGD: Tensor) -> Tensor:
    """The same by plain batched products: the heads of a group stack into the rows of one matrix."""
    length, batch, heads, channels = query_SBND.shape
    positions, groups = len(key_LBGD), key_LBGD.shape[2]
    per_group = heads // groups
    query = query_SBND.reshape(length, batch, groups, per_group, channels)
    query_ZRD = query.permute(1, 2, 3, 0, 4).reshape(batch * groups, per_group * length, channels)
    key_ZLD, value_ZLD = (
        x.permute(1, 2, 0, 3).reshape(batch * groups, positions, channels) for x in (key_LBGD, value_LBGD)
    )
    future = torch.full((length, positions), float("-inf"), dtype=query.dtype, device=query.device)
    scores = torch.baddbmm(
        future.triu(1 + positions - length).repeat(per_group, 1),
        query_ZRD,
        key_ZLD.transpose(1, 2),
        alpha=channels**-0.5,
    )
    out = torch.bmm(scores.softmax(-1), value_ZLD).view(batch, groups, per_group, length, channels)
    return out.permute(3, 0, 1, 2, 4).reshape(length, batch, heads * channels)
