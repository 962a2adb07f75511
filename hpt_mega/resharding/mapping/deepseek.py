"""DeepSeek-V3: latent attention, dense first layers, then experts chosen by group, and shared ones.

The layers that predict further tokens (num_nextn_predict_layers) are no part of the model that is trained.
"""

from hpt_mega.resharding.mapping.blocks import DENSE, ENDS, experts, layer_row, mixture, norm
from hpt_mega.resharding.mapping.fusion import GateUp, LatentDown, Replicated, Split
from hpt_mega.resharding.mapping.shape import (
    Config,
    Experts,
    KeysOf,
    LatentAttention,
    ModelShape,
    Yarn,
    read_shape,
    refuse_other_values,
    rope,
)
from hpt_mega.resharding.mapping.table import Family

_GROUP_SCORE_EXPERTS = 2  # a group is rated by its two best experts


def _latent(shape: ModelShape) -> LatentAttention:
    assert shape.latent is not None
    return shape.latent


def _shared_size(shape: ModelShape) -> int:
    size = mixture(shape).shared_ffn_hidden_size
    assert size is not None
    return size


def _query_rows(shape: ModelShape) -> int:
    return shape.num_attention_heads * (_latent(shape).qk_head_dim + _latent(shape).qk_rope_head_dim)


def _key_value_rows(shape: ModelShape) -> int:
    return shape.num_attention_heads * (_latent(shape).qk_head_dim + _latent(shape).v_head_dim)


LATENT_ATTENTION = (
    norm("input_layernorm.weight", "input_layernorm.weight"),
    layer_row(
        "self_attention.linear_q_down_proj.weight",
        ("self_attn.q_a_proj.weight",),
        LatentDown(lambda latent: latent.q_lora_rank),
        lambda s: ((_latent(s).q_lora_rank, s.hidden_size),),
    ),
    layer_row(
        "self_attention.q_layernorm.weight",
        ("self_attn.q_a_layernorm.weight",),
        Replicated(),
        lambda s: ((_latent(s).q_lora_rank,),),
        te="self_attention.linear_q_up_proj.layer_norm_weight",
    ),
    layer_row(
        "self_attention.linear_q_up_proj.weight",
        ("self_attn.q_b_proj.weight",),
        Split(0),
        lambda s: ((_query_rows(s), _latent(s).q_lora_rank),),
    ),
    layer_row(
        "self_attention.linear_kv_down_proj.weight",
        ("self_attn.kv_a_proj_with_mqa.weight",),
        LatentDown(lambda latent: latent.kv_lora_rank + latent.qk_rope_head_dim),
        lambda s: ((_latent(s).kv_lora_rank + _latent(s).qk_rope_head_dim, s.hidden_size),),
    ),
    layer_row(
        "self_attention.kv_layernorm.weight",
        ("self_attn.kv_a_layernorm.weight",),
        Replicated(),
        lambda s: ((_latent(s).kv_lora_rank,),),
        te="self_attention.linear_kv_up_proj.layer_norm_weight",
    ),
    layer_row(
        "self_attention.linear_kv_up_proj.weight",
        ("self_attn.kv_b_proj.weight",),
        Split(0),
        lambda s: ((_key_value_rows(s), _latent(s).kv_lora_rank),),
    ),
    layer_row(
        "self_attention.linear_proj.weight",
        ("self_attn.o_proj.weight",),
        Split(1),
        lambda s: ((s.hidden_size, s.num_attention_heads * _latent(s).v_head_dim),),
    ),
)

SELECTION_BIAS = (
    layer_row(
        "mlp.router.expert_bias",
        ("mlp.gate.e_score_correction_bias",),
        Replicated(),
        lambda s: ((mixture(s).count,),),
        layers="experts",
    ),
)

SHARED_EXPERTS = (
    layer_row(
        "mlp.shared_experts.linear_fc1.weight",
        ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
        GateUp(),
        lambda s: ((_shared_size(s), s.hidden_size),) * 2,
        layers="experts",
    ),
    layer_row(
        "mlp.shared_experts.linear_fc2.weight",
        ("mlp.shared_experts.down_proj.weight",),
        Split(1),
        lambda s: ((s.hidden_size, _shared_size(s)),),
        layers="experts",
    ),
)


def _read_shape(config: Config) -> ModelShape:
    # what megatron-core computes in one way only; its inner norms take the model's epsilon, transformers'
    # are fixed at 1e-6
    refuse_other_values(config, norm_topk_prob=True, rope_interleave=True, rms_norm_eps=1e-6)
    keys = KeysOf(config)
    if keys["q_lora_rank"] is None:
        raise ValueError("q_lora_rank is null in config.json; expected a rank (DeepSeek-V3's is 1536)")
    latent = LatentAttention(
        q_lora_rank=keys["q_lora_rank"],
        kv_lora_rank=keys["kv_lora_rank"],
        qk_head_dim=keys["qk_nope_head_dim"],
        qk_rope_head_dim=keys["qk_rope_head_dim"],
        v_head_dim=keys["v_head_dim"],
        yarn=_read_yarn(rope(config)),
    )
    # the name of the key before and since transformers 5
    count = config.get("n_routed_experts") or keys["num_local_experts"]
    chosen = Experts(
        count=count,
        top_k=keys["num_experts_per_tok"],
        ffn_hidden_size=keys["moe_intermediate_size"],
        first_layer=min(keys["first_k_dense_replace"], keys["num_hidden_layers"]),
        shared_ffn_hidden_size=keys["moe_intermediate_size"] * keys["n_shared_experts"],
        score="sigmoid",
        selection_bias=True,
        groups=keys["n_group"],
        top_groups=keys["topk_group"],
        scaling=keys["routed_scaling_factor"],
    )
    if chosen.top_k // keys["topk_group"] != _GROUP_SCORE_EXPERTS:
        raise ValueError(
            f"num_experts_per_tok is {chosen.top_k} and topk_group {chosen.top_groups} in config.json; "
            f"megatron-core rates a group by its {chosen.top_k} // {chosen.top_groups} best experts, this "
            f"architecture by {_GROUP_SCORE_EXPERTS}: the two must agree"
        )
    return read_shape(config, latent=latent, experts=chosen, head_dim=latent.qk_rope_head_dim)


def _read_yarn(parameters: Config) -> Yarn | None:
    kind = parameters["rope_type"]
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"rope_type is {kind!r} in config.json; expected 'default' or 'yarn'")
    refuse_other_values(parameters, attention_factor=None, truncate=True)
    scaled = parameters.get("mscale") and parameters.get("mscale_all_dim")
    return Yarn(
        factor=parameters["factor"],
        original_max_position_embeddings=parameters["original_max_position_embeddings"],
        beta_fast=parameters.get("beta_fast") or 32,
        beta_slow=parameters.get("beta_slow") or 1,
        mscale=parameters["mscale"] if scaled else 1.0,
        mscale_all_dim=parameters["mscale_all_dim"] if scaled else 0.0,
    )


DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    read_shape=_read_shape,
    rows=(
        *ENDS,
        *LATENT_ATTENTION,
        *DENSE,
        *experts("mlp", gate="gate_proj", up="up_proj", down="down_proj"),
        *SELECTION_BIAS,
        *SHARED_EXPERTS,
    ),
)
