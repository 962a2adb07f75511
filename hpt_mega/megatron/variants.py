"""Core attention on the CPU for shapes beyond plain causal attention: sliding windows, latent attention.

The plain one is in attention.py; on GPUs TE computes all three. Neither of these decodes from a cache.
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
        super().__init__(config, layer_number, *args, **kwargs)
        self._window = config.window_size[0] + 1

    def attend(self, query_SBND: Tensor, key_LBGD: Tensor, value_LBGD: Tensor) -> Tensor:
        """As CoreAttention's, within the window."""
        places = torch.arange(len(key_LBGD), device=query_SBND.device)
        distance_SL = places[-len(query_SBND) :, None] - places
        mask_SL = (distance_SL >= 0) & (distance_SL < self._window)
        return _attention(query_SBND, key_LBGD, value_LBGD, mask_SL)


class LatentCoreAttention(CoreAttention):
    """Causal attention whose values have other channels than its keys, and whose softmax scale is given."""

    def __init__(
        self, config: Any, layer_number: int, *args: Any, softmax_scale: float, **kwargs: Any
    ) -> None:
        super().__init__(config, layer_number, *args, **kwargs)
        self._scale = softmax_scale

    def attend(self, query_SBND: Tensor, key_LBND: Tensor, value_LBNC: Tensor) -> Tensor:
        """query [S, B, N, D], key [L, B, N, D], value [L, B, N, C] (a group a head) -> [S, B, N * C]."""
        if len(query_SBND) != len(key_LBND):
            raise ValueError("latent attention has no context parallelism on the CPU; set parallel.cp=1")
        return _attention(query_SBND, key_LBND, value_LBNC, None, self._scale)


def _attention(
    query_SBND: Tensor,
    key_LBGD: Tensor,
    value_LBGC: Tensor,
    mask_SL: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_LBGD, value_LBGC))
    out_BNSC = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask_SL,
        is_causal=mask_SL is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out_BNSC.permute(2, 0, 1, 3).flatten(2)
