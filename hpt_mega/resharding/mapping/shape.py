"""The numbers that fix a model's architecture, in Megatron's terms, and how a config.json's common keys read.

What a family reads beyond the common keys stands in its own file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Config = Mapping[str, Any]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's frequency scaling (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Yarn:
    """YaRN as DeepSeek uses it; mscale_all_dim 0 leaves the softmax scale alone."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float
    mscale_all_dim: float


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: keys and values are projected up from a shared low-rank vector."""

    q_lora_rank: int
    kv_lora_rank: int
    qk_head_dim: int  # channels without positions
    qk_rope_head_dim: int
    v_head_dim: int
    yarn: Yarn | None


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts layers."""

    count: int
    top_k: int
    ffn_hidden_size: int
    first_layer: int = 0  # layers before it are dense
    shared_ffn_hidden_size: int | None = None  # experts that see every token, fused into one
    score: str = "softmax"  # "softmax" | "sigmoid"
    normalized: bool = True  # the chosen experts' weights sum to one
    selection_bias: bool = False  # a bias that acts on the choice of experts only
    groups: int | None = None  # experts are chosen within the best `top_groups` of these
    top_groups: int | None = None
    scaling: float | None = None


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
    sliding_window: int | None = None  # a token sees this many positions, itself included
    experts: Experts | None = None
    latent: LatentAttention | None = None

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_size(self) -> int:
        return self.num_query_groups * self.head_dim

    def has_experts(self, layer: int) -> bool:
        return self.experts is not None and layer >= self.experts.first_layer

    @property
    def is_homogeneous(self) -> bool:
        """Whether all layers have the same parameters; Megatron stores such layers stacked under one key."""
        return self.experts is None or self.experts.first_layer == 0


def read_shape(config: Config, **fixed: Any) -> ModelShape:
    """The shape in a config.json of the common layout; `fixed` is what the family adds or settles.

    Raises ValueError for a key that is absent, and for features no part of this product computes.
    """
    refuse_other_values(config, hidden_act="silu", attention_bias=False, mlp_bias=False)
    with_keys = KeysOf(config)
    heads = with_keys["num_attention_heads"]
    read: dict[str, Any] = {
        "num_layers": with_keys["num_hidden_layers"],
        "hidden_size": with_keys["hidden_size"],
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or with_keys["hidden_size"] // heads,
        "ffn_hidden_size": with_keys["intermediate_size"],
        "vocab_size": with_keys["vocab_size"],
        "max_position_embeddings": with_keys["max_position_embeddings"],
        "norm_epsilon": with_keys["rms_norm_eps"],
        "tied": config.get("tie_word_embeddings", False),
        "rotary_base": rope(config).get("rope_theta", 10000.0),
    }
    if "latent" not in fixed:
        read["rope_scaling"] = _llama3_scaling(rope(config))
    return ModelShape(**{**read, **fixed})


class KeysOf:
    """A config.json whose absent keys are errors that name them."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __getitem__(self, key: str) -> Any:
        if key not in self._config:
            raise ValueError(f"config.json has no {key!r}, which this architecture needs")
        return self._config[key]


def refuse_other_values(config: Config, **supported: Any) -> None:
    """Raise ValueError for a key of config.json that is there with a value nothing here computes."""
    for key, expected in supported.items():
        if (value := config.get(key, expected)) != expected:
            raise ValueError(f"{key} is {value!r} in config.json; this architecture needs {expected!r}")


def rope(config: Config) -> Config:
    """The rotary parameters with rope_theta and rope_type: `rope_parameters` is what transformers 5 writes,
    `rope_theta` and `rope_scaling` what 4 wrote."""
    given = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if "rope_theta" in config:
        given.setdefault("rope_theta", config["rope_theta"])
    given.setdefault("rope_type", given.get("type", "default"))
    return given


def _llama3_scaling(parameters: Config) -> RopeScaling | None:
    kind = parameters["rope_type"]
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope_type is {kind!r} in config.json; expected 'default' or 'llama3'")
    return RopeScaling(**{name: parameters[name] for name in RopeScaling.__dataclass_fields__})
