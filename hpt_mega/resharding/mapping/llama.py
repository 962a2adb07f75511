"""Llama 1 to 3.1 and models of its architecture (SmolLM2)."""

from hpt_mega.resharding.mapping.fusion import GateUp, QueryKeyValue, Replicated, Split, Vocabulary
from hpt_mega.resharding.mapping.shape import read_shape
from hpt_mega.resharding.mapping.table import Family, Row

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    read_shape=read_shape,
    rows=(
        Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), Vocabulary()),
        Row(
            "decoder.layers.{layer}.input_layernorm.weight",
            ("model.layers.{layer}.input_layernorm.weight",),
            Replicated(),
        ),
        Row(
            "decoder.layers.{layer}.self_attention.linear_qkv.weight",
            (
                "model.layers.{layer}.self_attn.q_proj.weight",
                "model.layers.{layer}.self_attn.k_proj.weight",
                "model.layers.{layer}.self_attn.v_proj.weight",
            ),
            QueryKeyValue(),
        ),
        Row(
            "decoder.layers.{layer}.self_attention.linear_proj.weight",
            ("model.layers.{layer}.self_attn.o_proj.weight",),
            Split(1),
        ),
        Row(
            "decoder.layers.{layer}.pre_mlp_layernorm.weight",
            ("model.layers.{layer}.post_attention_layernorm.weight",),
            Replicated(),
        ),
        Row(
            "decoder.layers.{layer}.mlp.linear_fc1.weight",
            ("model.layers.{layer}.mlp.gate_proj.weight", "model.layers.{layer}.mlp.up_proj.weight"),
            GateUp(),
        ),
        Row(
            "decoder.layers.{layer}.mlp.linear_fc2.weight",
            ("model.layers.{layer}.mlp.down_proj.weight",),
            Split(1),
        ),
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), Replicated()),
        Row("output_layer.weight", ("lm_head.weight",), Vocabulary()),
    ),
)
