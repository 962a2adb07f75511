"""Shapes of models, with their parameter counts and FLOPs: presets by name, and `gpt` with free sizes.

How a shape is cut over GPUs is in memory.py and throughput.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

from hpt_mega.planning.job import PlanError
from hpt_mega.suggestion import did_you_mean


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder. Projections without bias; norms are RMSNorm.

    `full_attention_flops` is a matter of reporting only: whether the published TFLOP/s count the attention
    of a causal model in full (Megatron-LM's tables: arXiv 2104.04473, eq. 3, without recompute) or its causal
    half (Megatron-Bridge's tables, current Megatron-LM).
    """

    layers: int
    hidden: int
    heads: int
    ffn: int  # of a dense layer
    vocab: int
    kv_heads: int = 0  # 0: as many as heads
    head_dim: int = 0  # 0: hidden / heads
    gated: bool = True  # SwiGLU: two matrices into the ffn, one out
    tied: bool = False  # one matrix for embedding and output
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: int = 0
    topk: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0  # of the shared experts together
    dense_layers: int = 0  # leading layers without experts
    q_rank: int = 0  # multi-latent attention (arXiv 2405.04434): ranks (0: of whole queries), parts of a head
    kv_rank: int = 0
    rope_dim: int = 0
    full_attention_flops: bool = False

    def __post_init__(self) -> None:
        for size, value in vars(self).items():
            least = 1 if size in ("layers", "hidden", "heads", "vocab") else 0
            if value < least:
                raise PlanError(f"model.{size}={value}, expected {least} or above")
        if not self.head_dim and self.hidden % self.heads:
            raise PlanError(
                f"model.hidden={self.hidden} is not a multiple of model.heads={self.heads}; "
                "change one of them or give model.head_dim"
            )
        if self.heads % (self.kv_heads or self.heads):
            raise PlanError(f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}")
        if self.experts and not (0 < self.topk <= self.experts and self.expert_ffn > 0):
            raise PlanError(
                f"model.experts={self.experts} with model.topk={self.topk} and model.expert_ffn="
                f"{self.expert_ffn}; expected 1 <= topk <= experts and expert_ffn of 1 or above"
            )
        if self.dense_layers > self.layers:
            raise PlanError(
                f"model.dense_layers={self.dense_layers} of model.layers={self.layers}; expected as many as "
                "there are layers at most: lower model.dense_layers"
            )
        if not self.experts and self.ffn < 1:
            raise PlanError(f"model.ffn={self.ffn}, expected 1 or above")
        if self.dense_layers and self.ffn < 1:
            raise PlanError(
                f"model.ffn={self.ffn} with model.dense_layers={self.dense_layers}, which have no experts; "
                "expected model.ffn of 1 or above, or model.dense_layers=0"
            )
        if bool(self.kv_rank) != bool(self.rope_dim) or (self.q_rank and not self.kv_rank):
            raise PlanError(
                f"model.kv_rank={self.kv_rank} with model.rope_dim={self.rope_dim} and model.q_rank="
                f"{self.q_rank}; expected kv_rank and rope_dim of 1 or above, or all three 0: multi-latent "
                "attention needs both, other attention has none"
            )

    @property
    def dim(self) -> int:
        """Width of a head."""
        return self.head_dim or self.hidden // self.heads

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def query_width(self) -> int:
        return self.heads * self.dim

    @property
    def kv_width(self) -> int:
        """Of the keys, or of the values: one of the two."""
        return self.groups * self.dim

    @property
    def moe_layers(self) -> int:
        return self.layers - self.dense_layers if self.experts else 0

    @property
    def inward(self) -> int:
        """Matrices from hidden into an ffn."""
        return 2 if self.gated else 1

    def attention_matrices(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each projection of an attention block."""
        if not self.kv_rank:
            fused = self.query_width + 2 * self.kv_width
            return [(self.hidden, fused), (self.query_width, self.hidden)]
        queries = self.heads * (self.dim + self.rope_dim)
        steps = [self.hidden, self.q_rank, queries] if self.q_rank else [self.hidden, queries]
        return [
            *pairwise(steps),
            (self.hidden, self.kv_rank + self.rope_dim),
            (self.kv_rank, self.heads * 2 * self.dim),
            (self.query_width, self.hidden),
        ]

    def ffn_matrices(self, width: int) -> list[tuple[int, int]]:
        return [(self.hidden, self.inward * width), (width, self.hidden)]

    def attention_parameters(self) -> int:
        """Of one layer, with both of the layer's norms."""
        count = sum(inputs * outputs for inputs, outputs in self.attention_matrices()) + 2 * self.hidden
        count += self.q_rank + self.kv_rank  # norms of the compressed queries and keys
        count += self.query_width + 2 * self.kv_width if self.qkv_bias else 0
        return count + (2 * self.dim if self.qk_norm else 0)

    def expert_parameters(self) -> int:
        """Of all routed experts of one layer."""
        return self.experts * (self.inward + 1) * self.hidden * self.expert_ffn

    def ffn_parameters(self, moe: bool) -> int:
        """Of one layer's ffn outside the routed experts: dense, or router and shared experts."""
        if not moe:
            return (self.inward + 1) * self.hidden * self.ffn
        return self.hidden * self.experts + (self.inward + 1) * self.hidden * self.shared_ffn

    def embedding_parameters(self) -> int:
        return self.vocab * self.hidden

    def parameters(self) -> int:
        """All of the model, each matrix once."""
        total = self.layers * self.attention_parameters() + self.hidden
        total += self.moe_layers * (self.ffn_parameters(moe=True) + self.expert_parameters())
        total += (self.layers - self.moe_layers) * self.ffn_parameters(moe=False)
        return total + (1 if self.tied else 2) * self.embedding_parameters()

    def active_parameters(self) -> int:
        """That a token is multiplied with: its experts and the output matrix, not the embedding."""
        idle = self.moe_layers * self.expert_parameters() * (1 - self.topk / max(self.experts, 1))
        return self.parameters() - round(idle) - (0 if self.tied else self.embedding_parameters())

    def flops_per_token(self, seq: int) -> float:
        """Model FLOPs of forward and backward, no recompute: the numerator of published TFLOP/s."""
        score_width = self.heads * (2 * self.dim + self.rope_dim)
        attention = 2 * score_width * seq * self.layers
        return 6 * self.active_parameters() + 3 * attention * (1.0 if self.full_attention_flops else 0.5)


def _llama(layers: int, hidden: int, heads: int, ffn: int) -> ModelShape:
    return ModelShape(layers, hidden, heads, ffn, vocab=128256, kv_heads=8)


def _qwen2_5(layers: int, hidden: int, heads: int, ffn: int, kv_heads: int) -> ModelShape:
    return ModelShape(layers, hidden, heads, ffn, vocab=152064, kv_heads=kv_heads, qkv_bias=True)


def _qwen3_moe(layers: int, hidden: int, heads: int, expert_ffn: int) -> ModelShape:
    return ModelShape(
        layers,
        hidden,
        heads,
        ffn=0,
        vocab=151936,
        kv_heads=4,
        head_dim=128,
        qk_norm=True,
        experts=128,
        topk=8,
        expert_ffn=expert_ffn,
    )


# Sizes: config.json as published with the weights. gpt: the smallest of Megatron-LM's table.
MODELS = {
    "llama3_1_8b": _llama(32, 4096, 32, 14336),
    "llama3_1_70b": _llama(80, 8192, 64, 28672),
    "llama3_1_405b": _llama(126, 16384, 128, 53248),
    "qwen2_5_7b": _qwen2_5(28, 3584, 28, 18944, 4),
    "qwen2_5_72b": _qwen2_5(80, 8192, 64, 29568, 8),
    "qwen2_5_math_7b": _qwen2_5(28, 3584, 28, 18944, 4),
    "qwen3_30b_a3b": _qwen3_moe(48, 2048, 32, 768),
    "qwen3_235b_a22b": _qwen3_moe(94, 4096, 64, 1536),
    "deepseek_v3": ModelShape(
        61,
        7168,
        128,
        18432,
        129280,
        head_dim=128,
        experts=256,
        topk=8,
        expert_ffn=2048,
        shared_ffn=2048,
        dense_layers=3,
        q_rank=1536,
        kv_rank=512,
        rope_dim=64,
    ),
    "gpt": ModelShape(24, 2048, 16, 8192, 131072, gated=False, full_attention_flops=True),
}


def model(name: str, **sizes: Any) -> ModelShape:
    """A preset with some sizes changed. Raises PlanError for unknown names and sizes that do not fit."""
    if name not in MODELS:
        near = did_you_mean(name, MODELS)
        raise PlanError(f"unknown model {name}{near}; expected one of {', '.join(MODELS)}")
    unknown = sizes.keys() - {field.name for field in fields(ModelShape)}
    if unknown:
        known = ", ".join(field.name for field in fields(ModelShape))
        raise PlanError(f"unknown size model.{sorted(unknown)[0]}; expected one of {known}")
    if name == "gpt" and "ffn" not in sizes and "hidden" in sizes:
        sizes["ffn"] = 4 * sizes["hidden"]
    return replace(MODELS[name], **sizes)
