"""Core attention of the local (CPU) layer spec, with the key/value cache that rollouts decode from.

TE brings its own core attention on GPUs; this one replaces megatron-core's unfused softmax.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class KVCache:
    """Keys and values of one layer for a batch of sequences of unequal lengths.

    keys_BGLD / values_BGLD: B sequences, G query groups on this tensor-parallel rank, L positions, D
    channels. `positions_B` is where the next token of each sequence goes; it is shared by all layers and
    advanced by the engine.
    """

    def __init__(self, keys_BGLD: Tensor, values_BGLD: Tensor) -> None:
        self.keys_BGLD = keys_BGLD
        self.values_BGLD = values_BGLD

    def write_prompt(self, key_SBGD: Tensor, value_SBGD: Tensor) -> None:
        length = key_SBGD.shape[0]
        self.keys_BGLD[:, :, :length] = key_SBGD.permute(1, 2, 0, 3)
        self.values_BGLD[:, :, :length] = value_SBGD.permute(1, 2, 0, 3)

    def write_token(self, key_1BGD: Tensor, value_1BGD: Tensor, positions_B: Tensor) -> None:
        rows = torch.arange(len(positions_B))
        self.keys_BGLD[rows, :, positions_B] = key_1BGD[0]
        self.values_BGLD[rows, :, positions_B] = value_1BGD[0]

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given rows of the batch."""
        self.keys_BGLD = self.keys_BGLD.index_select(0, rows)
        self.values_BGLD = self.values_BGLD.index_select(0, rows)


class DecodeState:
    """What every layer needs to know about the decode step in progress."""

    def __init__(self, positions_B: Tensor, visible: int) -> None:
        self.positions_B = positions_B
        self.visible = visible  # cache positions that can hold a token of any sequence
        mask_BL = torch.arange(visible) <= positions_B[:, None]
        self.mask_B11L = mask_BL[:, None, None, :]


class CoreAttention(torch.nn.Module):
    """Causal attention over right-padded sequences: a real token never sees the padding after it.

    With a cache attached, a forward over several positions fills it (prefill) and a forward over one
    position with a DecodeState reads it (decode).
    """

    def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        if config.context_parallel_size > 1:
            raise ValueError("the local core attention has no context parallelism; set parallel.cp=1")
        self.cache: KVCache | None = None
        self.decode: DecodeState | None = None

    def forward(
        self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N * D]."""
        if self.cache is not None and self.decode is not None:
            return self._decode(query_SBND, key_SBGD, value_SBGD, self.cache, self.decode)
        if self.cache is not None:
            self.cache.write_prompt(key_SBGD, value_SBGD)
        return causal_attention(query_SBND, key_SBGD, value_SBGD)

    @staticmethod
    def _decode(query: Tensor, key: Tensor, value: Tensor, cache: KVCache, state: DecodeState) -> Tensor:
        cache.write_token(key, value, state.positions_B)
        _, batch, heads, channels = query.shape
        groups = key.shape[2]
        # the query heads of a group share its keys: treat them as rows of one small matrix
        query_BGRD = query[0].view(batch, groups, heads // groups, channels)
        out_BGRD = scaled_dot_product_attention(
            query_BGRD,
            cache.keys_BGLD[:, :, : state.visible],
            cache.values_BGLD[:, :, : state.visible],
            attn_mask=state.mask_B11L,
        )
        return out_BGRD.reshape(1, batch, heads * channels)


def causal_attention(query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
    """Grouped-query causal attention, [S, B, N, D] and [S, B, G, D] -> [S, B, N * D]."""
    if query_SBND.dtype is torch.bfloat16 and len(query_SBND) <= _SHORT:
        return _short_bf16_attention(query_SBND, key_SBGD, value_SBGD)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
    out_BNSD = scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out_BNSD.permute(2, 0, 1, 3).flatten(2)


_SHORT = 512  # the fused CPU kernel's bf16 backward is about 3x slower than plain products below this


def _short_bf16_attention(query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
    """The same by plain batched products: the heads of a group stack into the rows of one matrix."""
    length, batch, heads, channels = query_SBND.shape
    groups = key_SBGD.shape[2]
    per_group = heads // groups
    query = query_SBND.reshape(length, batch, groups, per_group, channels)
    query_ZRD = query.permute(1, 2, 3, 0, 4).reshape(batch * groups, per_group * length, channels)
    key_ZSD, value_ZSD = (
        x.permute(1, 2, 0, 3).reshape(batch * groups, length, channels) for x in (key_SBGD, value_SBGD)
    )
    future = torch.full((length, length), float("-inf"), dtype=query.dtype, device=query.device).triu(1)
    scores = torch.baddbmm(
        future.repeat(per_group, 1), query_ZRD, key_ZSD.transpose(1, 2), alpha=channels**-0.5
    )
    out = torch.bmm(scores.softmax(-1), value_ZSD).view(batch, groups, per_group, length, channels)
    return out.permute(3, 0, 1, 2, 4).reshape(length, batch, heads * channels)
