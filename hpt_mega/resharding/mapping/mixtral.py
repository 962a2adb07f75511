"""Mixtral: Mistral's attention, and experts in every layer, weighted by a softmax over the chosen ones."""

from hpt_mega.resharding.mapping.blocks import ATTENTION, ENDS, experts
from hpt_mega.resharding.mapping.shape import Config, Experts, KeysOf, ModelShape, read_shape
from hpt_mega.resharding.mapping.table import Family


def _read_shape(config: Config) -> ModelShape:
    keys = KeysOf(config)
    mixture = Experts(
        count=keys["num_local_experts"],
        top_k=keys["num_experts_per_tok"],
        ffn_hidden_size=keys["intermediate_size"],
    )
    return read_shape(config, sliding_window=config.get("sliding_window"), experts=mixture)


MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    read_shape=_read_shape,
    rows=(*ENDS, *ATTENTION, *experts("block_sparse_moe", gate="w1", up="w3", down="w2")),
)
