"""Qwen3: norms on query and key, no bias; dense, or with experts in every layer."""

from hpt_mega.resharding.mapping.blocks import ATTENTION, DENSE, ENDS, QK_NORM, experts
from hpt_mega.resharding.mapping.shape import (
    Config,
    Experts,
    KeysOf,
    ModelShape,
    read_shape,
    refuse_other_values,
)
from hpt_mega.resharding.mapping.table import Family


def _read_dense(config: Config) -> ModelShape:
    refuse_other_values(config, use_sliding_window=False)
    return read_shape(config, qk_norm=True, head_dim=config.get("head_dim", 128))


def _read_mixture(config: Config) -> ModelShape:
    refuse_other_values(config, use_sliding_window=False, decoder_sparse_step=1, mlp_only_layers=[])
    keys = KeysOf(config)
    # transformers 5 renamed the number of experts
    count = config.get("num_experts") or keys["num_local_experts"]
    mixture = Experts(
        count=count,
        top_k=keys["num_experts_per_tok"],
        ffn_hidden_size=keys["moe_intermediate_size"],
        normalized=config.get("norm_topk_prob", False),
    )
    return read_shape(config, qk_norm=True, experts=mixture)


QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    read_shape=_read_dense,
    rows=(*ENDS, *ATTENTION, *QK_NORM, *DENSE),
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    read_shape=_read_mixture,
    rows=(*ENDS, *ATTENTION, *QK_NORM, *experts("mlp", gate="gate_proj", up="up_proj", down="down_proj")),
)
