"""The tables name what megatron-core's two layer specs name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hpt_mega.resharding.mapping import FAMILIES, MappingError, family_for
from hpt_mega.resharding.mapping.table import EMBEDDING, canonical_name
from tests.checkpoint.families import MODELS


def family_and_shape(name: str) -> tuple[Any, Any]:
    config = json.loads(MODELS[name]().config.to_json_string())
    config["architectures"] = [type(MODELS[name]()).__name__]
    family = family_for(config)
    return family, family.read_shape(config)


@pytest.mark.parametrize("name", MODELS)
def test_no_two_parameters_share_a_name(name: str) -> None:
    family, shape = family_and_shape(name)
    entries = list(family.entries(shape))
    for names in (
        [entry.megatron for entry in entries],
        [entry.te for entry in entries],
        [hf for entry in entries for hf in entry.hf],
    ):
        assert len(names) == len(set(names))


def test_every_family_is_tested() -> None:
    assert {family_and_shape(name)[0].name for name in MODELS} == {family.name for family in FAMILIES}


# as transformer_engine modules name their parameters: LayerNormLinear, Linear, GroupedLinear
TE_DENSE = {
    "self_attention.linear_proj.weight",
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "mlp.linear_fc1.layer_norm_weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
}
TE_EXPERTS = {
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    *(f"mlp.experts.linear_fc{number}.weight{expert}" for number in (1, 2) for expert in range(4)),
}
TE_ATTENTION = {name for name in TE_DENSE if name.startswith("self_attention")}
TE_LATENT = {
    "input_layernorm.weight",
    *(
        f"self_attention.linear_{part}.weight"
        for part in ("q_down_proj", "q_up_proj", "kv_down_proj", "kv_up_proj", "proj")
    ),
    "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight",
}
QK = {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}


@pytest.mark.parametrize(
    ("name", "layer", "expected"),
    [
        ("llama", 2, TE_DENSE),
        ("qwen2", 0, TE_DENSE | {"self_attention.linear_qkv.bias"}),
        ("qwen3", 1, TE_DENSE | QK),
        ("qwen3_moe", 1, TE_ATTENTION | QK | TE_EXPERTS),
        ("mixtral", 1, TE_ATTENTION | TE_EXPERTS),
        ("deepseek_v3", 0, TE_LATENT | {n for n in TE_DENSE if n.startswith("mlp")}),
    ],
)
def test_the_names_under_transformer_engine(name: str, layer: int, expected: set[str]) -> None:
    family, shape = family_and_shape(name)
    named = {entry.te for entry in family.entries(shape) if entry.layer == layer}
    assert named == {f"decoder.layers.{layer}.{rest}" for rest in expected}


def test_names_of_a_stage_become_the_models() -> None:
    for given, expected in (
        ("decoder.layers.1.mlp.linear_fc1.weight", "decoder.layers.6.mlp.linear_fc1.weight"),
        (
            "decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight",
            "decoder.layers.5.mlp.experts.local_experts.9.linear_fc2.weight",
        ),
        (
            "decoder.layers.0.mlp.experts.linear_fc1.weight3",
            "decoder.layers.5.mlp.experts.linear_fc1.weight11",
        ),
        ("decoder.final_layernorm.weight", "decoder.final_layernorm.weight"),
    ):
        assert canonical_name(given, first_layer=5, first_expert=8, tied=True) == expected
    assert canonical_name("output_layer.weight", 5, 0, tied=True) == EMBEDDING
    assert canonical_name("output_layer.weight", 5, 0, tied=False) == "output_layer.weight"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("deepseek_v3", {"topk_group": 1}, "the two must agree"),
        ("deepseek_v3", {"q_lora_rank": None}, "q_lora_rank is null"),
        ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    ],
)
def test_what_nothing_here_computes_is_refused(name: str, change: dict[str, Any], message: str) -> None:
    model = MODELS[name]()
    config = {**json.loads(model.config.to_json_string()), "architectures": [type(model).__name__]}
    with pytest.raises(ValueError, match=message):
        family_for(config).read_shape({**config, **change})


def test_gemma_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(MappingError, match="known: LlamaForCausalLM"):
        family_for({"architectures": ["Gemma3ForCausalLM"]})
