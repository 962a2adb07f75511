"""The numbers that fix a model's architecture, in Megatron's terms, read from a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer with RMSNorm, rotary positions and gated SiLU feed-forward layers."""

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    tied: bool  # the output layer is the embedding
    rope_scaling: RopeScaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False


def read_shape(config: Mapping[str, Any], *, qkv_bias: bool = False, qk_norm: bool = False) -> ModelShape:
    """The shape in a config.json of the common layout; what a family fixes is not in the file.

    Raises ValueError for a key that is absent, and for features no part of this product computes.
    """
    for key, supported in (("hidden_act", ("silu",)), ("attention_bias", (False,)), ("mlp_bias", (False,))):
        if (value := config.get(key, supported[0])) not in supported:
            raise ValueError(f"{key} is {value!r} in config.json; expected {supported[0]!r}")
    try:
        heads = config["num_attention_heads"]
        return ModelShape(
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            num_attention_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            ffn_hidden_size=config["intermediate_size"],
            vocab_size=config["vocab_size"],
            max_position_embeddings=config["max_position_embeddings"],
            norm_epsilon=config["rms_norm_eps"],
            tied=config.get("tie_word_embeddings", False),
            **_rope(config),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
        )
    except KeyError as missing:
        raise ValueError(f"config.json has no {missing}, which this architecture needs") from None


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rotary_base": base, "rope_scaling": None}
    if kind != "llama3":
        raise ValueError(f"rope_type is {kind!r} in config.json; expected 'default' or 'llama3'")
    names = RopeScaling.__dataclass_fields__
    return {"rotary_base": base, "rope_scaling": RopeScaling(**{name: rope[name] for name in names})}
