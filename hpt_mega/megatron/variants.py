"""Core attention on the CPU for shapes beyond plain causal attention: sliding windows, latent attention.

The plain one, with the cache that rollouts decode from, is in attention.py; on GPUs TE computes all three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hpt_mega.megatron.attention import CoreAttention


class WindowAttention(CoreAttention):
    """Causal attention in which a token sees the last `window` positions, itself included."""

    def __init__(self, config: Any, layer_number: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, layer_number)
        self._window = config.window_size[0] + 1

    def forward(
        self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """query [S, B, N, D], key and value [S, B, G, D] -> [S, B, N * D]."""
        if self.cache is not None and (self.decode is None or self.decode.visible > self._window):
            raise ValueError(
                "decoding with a sliding window is not implemented on the CPU; sample with rollout=vllm"
            )
        if self.cache is not None:
            return super().forward(query_SBND, key_SBGD, value_SBGD)
        length = len(query_SBND)
        positions = torch.arange(length, device=query_SBND.device)
        distance = positions[:, None] - positions
        return _attention(query_SBND, key_SBGD, value_SBGD, (distance >= 0) & (distance < self._window))


class LatentCoreAttention(CoreAttention):
    """Causal attention whose values have other channels than its keys, and whose softmax scale is given."""

    def __init__(
        self, config: Any, layer_number: int, *args: Any, softmax_scale: float, **kwargs: Any
    ) -> None:
        super().__init__(config, layer_number)
        self._scale = softmax_scale

    def forward(
        self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """query and key [S, B, N, D], value [S, B, N, C] (as many groups as heads) -> [S, B, N * C]."""
        if self.cache is not None:
            raise ValueError(
                "decoding with latent attention is not implemented on the CPU; sample with rollout=vllm"
            )
        return _attention(query_SBND, key_SBGD, value_SBGD, None, self._scale)


def _attention(
    query_SBND: Tensor,
    key_SBGD: Tensor,
    value_SBGC: Tensor,
    mask_SS: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGC))
    out_BNSC = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask_SS,
        is_causal=mask_SS is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out_BNSC.permute(2, 0, 1, 3).flatten(2)
