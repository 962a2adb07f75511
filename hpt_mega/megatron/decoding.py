"""Decoding from a cache of keys and values: prompts by the model's own forward, then a token at a time.

The prompts run through megatron-core's modules, whose core attention fills the cache (Decoding). A token a
sequence is little arithmetic, and what a module does around it would take most of the time, so a Decoder
computes it from the weights and functions of the same modules. Modules that it does not open it calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from hpt_mega.megatron import cpu
from hpt_mega.megatron.attention import causal_attention

cpu.install()

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear  # noqa: E402
from megatron.core.transformer.mlp import MLP  # noqa: E402

from hpt_mega.megatron.precision import EmulatedProduct  # noqa: E402

Operation = Callable[[Tensor], Tensor]


class KVCache:
    """Keys and values of one layer: B sequences, G query groups on this tensor-parallel rank, D channels.

    Sequence b has its prompt in the first of the L slots; those up to the longest prompt's end stay unused,
    so that all sequences write their n-th new token into one slot.
    """

    def __init__(self, keys_BGLD: Tensor, values_BGLD: Tensor) -> None:
        self.keys_BGLD = keys_BGLD
        self.values_BGLD = values_BGLD

    def write(self, slot: int, key_SBGD: Tensor, value_SBGD: Tensor) -> None:
        """From `slot` on, one slot for each of the S positions."""
        slots = slice(slot, slot + key_SBGD.shape[0])
        self.keys_BGLD[:, :, slots] = key_SBGD.permute(1, 2, 0, 3)
        self.values_BGLD[:, :, slots] = value_SBGD.permute(1, 2, 0, 3)

    def select(self, rows: Tensor) -> None:
        """Keep (or repeat) the given rows of the batch."""
        self.keys_BGLD = self.keys_BGLD.index_select(0, rows)
        self.values_BGLD = self.values_BGLD.index_select(0, rows)


class Decoding:
    """Lets a core attention, the base class after this one, write prompts into the cache lent to it."""

    cache: KVCache | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As CoreAttention's; with a cache, over right-padded prompts, neither packed nor shared over
        context-parallel ranks."""
        if self.cache is None:
            out: Tensor = super().forward(query, key, value, *args, **kwargs)  # type: ignore[misc]
            return out
        self.cache.write(0, key, value)
        return causal_attention(query, key, value)


def with_decoding(core: type) -> type:
    """A plain causal core attention, ours or TE's, that can fill a cache too; one that can as it is."""
    return core if issubclass(core, Decoding) else type(f"Decoding{core.__name__}", (Decoding, core), {})


def hidden_slots(prompt_lengths_B: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """What attention adds to the scores of L slots, [B, 1, 1, L]: -inf between a prompt's end and the
    longest one's."""
    slots_L = torch.arange(slots)
    unused_BL = (slots_L >= prompt_lengths_B[:, None]) & (slots_L < prompt_lengths_B.max())
    return torch.zeros(unused_BL.shape, dtype=dtype).masked_fill_(unused_BL, -torch.inf)[:, None, None]


@dataclass(frozen=True)
class NextToken:
    """One new position of each of B sequences."""

    slot: int
    hidden_B11L: Tensor  # see hidden_slots
    angles_1B1D: Tensor  # rotary angles


class Decoder:
    """The layers of a model chunk, for one new position a sequence."""

    def __init__(self, chunk: Any) -> None:
        self._layers = [_Layer(layer) for layer in chunk.decoder.layers]
        self._final_norm = chunk.decoder.final_layernorm

    def __call__(self, hidden_1BH: Tensor, token: NextToken, caches: Sequence[KVCache]) -> Tensor:
        """[1, B, H] -> [1, B, H]; writes the token's keys and values into the layers' caches."""
        hidden_BH, angles_B11D = hidden_1BH[0], token.angles_1B1D[0, :, None]
        cosine_B11D, sine_B11D = (x.to(hidden_BH.dtype) for x in (angles_B11D.cos(), angles_B11D.sin()))
        sine_B11D[..., : sine_B11D.shape[-1] // 2].neg_()  # of the half that is rotated into the first one
        for layer, cache in zip(self._layers, caches, strict=True):
            hidden_BH = layer(hidden_BH, token, (cosine_B11D, sine_B11D), cache)
        if self._final_norm is not None:
            hidden_BH = self._final_norm(hidden_BH)
        return hidden_BH[None]


class _Layer:
    """A transformer layer: its norms as they are, its products and what is between them opened."""

    def __init__(self, layer: Any) -> None:
        attention = layer.self_attention
        self._attention_norm, self._mlp_norm = layer.input_layernorm, layer.pre_mlp_layernorm
        self._query_norm, self._key_norm = attention.q_layernorm, attention.k_layernorm
        self._qkv, self._out = _linear(attention.linear_qkv), _linear(attention.linear_proj)
        self._mlp = _mlp(layer.mlp)

    def __call__(
        self, hidden_BH: Tensor, token: NextToken, rotation: tuple[Tensor, Tensor], cache: KVCache
    ) -> Tensor:
        mixed_BX = self._qkv(self._attention_norm(hidden_BH))
        hidden_BH = hidden_BH + self._out(self._attend(mixed_BX, token, rotation, cache))
        return hidden_BH + self._mlp(self._mlp_norm(hidden_BH))

    def _attend(
        self, mixed_BX: Tensor, token: NextToken, rotation: tuple[Tensor, Tensor], cache: KVCache
    ) -> Tensor:
        """Of each group its queries, its key and its value, [B, X] -> attention's outputs [B, N * D]."""
        _, groups, _, channels = cache.keys_BGLD.shape
        mixed_BGMD = mixed_BX.view(len(mixed_BX), groups, -1, channels)
        rotated_BGRD = _rotated(self._normed(mixed_BGMD[:, :, :-1]), *rotation)
        cache.write(token.slot, rotated_BGRD[None, :, :, -1], mixed_BGMD[None, :, :, -1])
        visible = slice(token.slot + 1)
        out_BGRD = _attention(  # the query heads of a group share its keys: rows of one small matrix
            rotated_BGRD[:, :, :-1],
            cache.keys_BGLD[:, :, visible],
            cache.values_BGLD[:, :, visible],
            token.hidden_B11L[..., visible],
        )
        return out_BGRD.reshape(len(mixed_BX), -1)

    def _normed(self, heads_BGRD: Tensor) -> Tensor:
        """The queries and the key after their norms, where the family has such."""
        if self._query_norm is None:
            return heads_BGRD
        queries, key = heads_BGRD[:, :, :-1], heads_BGRD[:, :, -1:]
        return torch.cat((self._query_norm(queries), self._key_norm(key)), dim=2)


def _rotated(heads_BGRD: Tensor, cosine_B11D: Tensor, sine_B11D: Tensor) -> Tensor:
    """Rotary embedding by halves; the sine of the first half is negative."""
    swapped_BGRD = heads_BGRD.roll(heads_BGRD.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads_BGRD * cosine_B11D, swapped_BGRD, sine_B11D)


def _linear(module: Any) -> Operation:
    """A linear layer on the rows of a decoding step, [B, H]."""
    if not _is_plain(module):
        return lambda x_BH: module(x_BH[None])[0][0]
    if isinstance(module, ColumnParallelLinear) or module.tp_group.size() == 1:
        return lambda x_BH: _product(x_BH, module.weight, module.bias)

    def partial_sum(x_BH: Tensor) -> Tensor:
        out_BH = _product(x_BH, module.weight).contiguous()
        dist.all_reduce(out_BH, group=module.tp_group)
        return out_BH

    return partial_sum


def _is_plain(module: Any) -> bool:
    """megatron-core's own product of a matrix and what comes in; not TE's, not an emulated one."""
    return isinstance(module, ColumnParallelLinear | RowParallelLinear) and not isinstance(
        module._forward_impl, EmulatedProduct
    )


def _mlp(module: Any) -> Operation:
    """The part after the attention on [B, H]: gated products, or whatever the layer has, experts included."""
    if type(module) is not MLP or not _is_plain(module.linear_fc1):
        return lambda x_BH: module(x_BH[None])[0][0]
    up, down, activation = _linear(module.linear_fc1), _linear(module.linear_fc2), module.activation_func

    def gated(x_BH: Tensor) -> Tensor:
        gate_BF, value_BF = up(x_BH).chunk(2, dim=-1)
        return down(activation(gate_BF).mul_(value_BF))

    return gated


def _attention(query_BGRD: Tensor, key_BGLD: Tensor, value_BGLD: Tensor, hidden_B11L: Tensor) -> Tensor:
    if not _shared_by_threads(query_BGRD):
        return scaled_dot_product_attention(query_BGRD, key_BGLD, value_BGLD, attn_mask=hidden_B11L)
    scores_BGRL = (query_BGRD * query_BGRD.shape[-1] ** -0.5) @ key_BGLD.transpose(2, 3)
    return scores_BGRL.add_(hidden_B11L).softmax(-1) @ value_BGLD


def _product(x_BK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """[B, K] and [N, K] -> [B, N]."""
    if not _shared_by_threads(x_BK):
        return linear(x_BK, weight_NK, bias_N)
    out_BN = (weight_NK @ x_BK.contiguous().t()).t()
    return out_BN if bias_N is None else out_BN + bias_N


def _shared_by_threads(x: Tensor) -> bool:
    """Where torch's own operation takes longer than the same by other products.

    Of a few rows of fp32 the fused attention is slower with two threads than with one, and a product is
    hardly faster; plain products take a third of the attention's time, a transposed one two thirds of its.
    """
    return x.is_cpu and x.dtype is torch.float32 and torch.get_num_threads() > 1
