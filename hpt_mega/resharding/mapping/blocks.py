"""Rows that several families share: the parts of a decoder under their usual names.

A family's file puts blocks together and adds what is its own.
"""

from __future__ import annotations

from hpt_mega.resharding.mapping.fusion import Fusion, GateUp, QueryKeyValue, Replicated, Split, Vocabulary
from hpt_mega.resharding.mapping.shape import Experts, ModelShape
from hpt_mega.resharding.mapping.table import (
    EMBEDDING,
    HF_EMBEDDING,
    HF_OUTPUT_LAYER,
    OUTPUT_LAYER,
    Row,
    Shapes,
)


def layer_row(
    megatron: str,
    hf: tuple[str, ...],
    fusion: Fusion,
    shapes: Shapes,
    te: str | None = None,
    layers: str = "all",
) -> Row:
    """A row of the decoder layers; names are given without "decoder.layers.{layer}." and its counterpart."""
    return Row(
        f"decoder.layers.{{layer}}.{megatron}",
        tuple(f"model.layers.{{layer}}.{name}" for name in hf),
        fusion,
        shapes,
        te=te and f"decoder.layers.{{layer}}.{te}",
        layers=layers,
    )


def norm(megatron: str, hf: str, te: str | None = None, layers: str = "all") -> Row:
    """The weight of a norm of the hidden state."""
    return layer_row(megatron, (hf,), Replicated(), lambda s: ((s.hidden_size,),), te, layers)


ENDS = (
    Row(EMBEDDING, (HF_EMBEDDING,), Vocabulary(), lambda s: ((s.vocab_size, s.hidden_size),)),
    Row(
        "decoder.final_layernorm.weight",
        ("model.norm.weight",),
        Replicated(),
        lambda s: ((s.hidden_size,),),
    ),
    Row(OUTPUT_LAYER, (HF_OUTPUT_LAYER,), Vocabulary(), lambda s: ((s.vocab_size, s.hidden_size),)),
)

ATTENTION = (
    norm(
        "input_layernorm.weight", "input_layernorm.weight", te="self_attention.linear_qkv.layer_norm_weight"
    ),
    layer_row(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        QueryKeyValue(),
        lambda s: tuple((rows, s.hidden_size) for rows in (s.query_size, s.key_size, s.key_size)),
    ),
    layer_row(
        "self_attention.linear_proj.weight",
        ("self_attn.o_proj.weight",),
        Split(1),
        lambda s: ((s.hidden_size, s.query_size),),
    ),
)

QKV_BIAS = (
    layer_row(
        "self_attention.linear_qkv.bias",
        ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        QueryKeyValue(),
        lambda s: ((s.query_size,), (s.key_size,), (s.key_size,)),
    ),
)

QK_NORM = tuple(
    layer_row(
        f"self_attention.{part}_layernorm.weight",
        (f"self_attn.{part}_norm.weight",),
        Replicated(),
        lambda s: ((s.head_dim,),),
    )
    for part in "qk"
)

DENSE = (
    norm(
        "pre_mlp_layernorm.weight",
        "post_attention_layernorm.weight",
        te="mlp.linear_fc1.layer_norm_weight",
        layers="dense",
    ),
    layer_row(
        "mlp.linear_fc1.weight",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        GateUp(),
        lambda s: ((s.ffn_hidden_size, s.hidden_size),) * 2,
        layers="dense",
    ),
    layer_row(
        "mlp.linear_fc2.weight",
        ("mlp.down_proj.weight",),
        Split(1),
        lambda s: ((s.hidden_size, s.ffn_hidden_size),),
        layers="dense",
    ),
)


def experts(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """The rows of layers with experts, whose router is `block`.gate and experts `block`.experts.N.NAME.

    Unlike in a dense layer, Transformer Engine keeps the norm apart: the router reads its output too.
    """
    of_expert = f"{block}.experts.{{expert}}"
    return (
        norm("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", layers="experts"),
        layer_row(
            "mlp.router.weight",
            (f"{block}.gate.weight",),
            Replicated(),
            lambda s: ((mixture(s).count, s.hidden_size),),
            layers="experts",
        ),
        layer_row(
            "mlp.experts.local_experts.{expert}.linear_fc1.weight",
            (f"{of_expert}.{gate}.weight", f"{of_expert}.{up}.weight"),
            GateUp(),
            lambda s: ((mixture(s).ffn_hidden_size, s.hidden_size),) * 2,
            te="mlp.experts.linear_fc1.weight{expert}",
            layers="experts",
        ),
        layer_row(
            "mlp.experts.local_experts.{expert}.linear_fc2.weight",
            (f"{of_expert}.{down}.weight",),
            Split(1),
            lambda s: ((s.hidden_size, mixture(s).ffn_hidden_size),),
            te="mlp.experts.linear_fc2.weight{expert}",
            layers="experts",
        ),
    )


def mixture(shape: ModelShape) -> Experts:
    """The experts of a model that has some."""
    assert shape.experts is not None
    return shape.experts
