"""Parameter counts against transformers' own models on the meta device, FLOPs against published tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hpt_mega.planning import MODELS, PlanError, model

# As in the published config.json of each; unnamed values are transformers' defaults.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama3_1_8b": {"layers": 32, "hidden": 4096, "ffn": 14336, "heads": 32, "kv": 8, "vocab": 128256},
    "llama3_1_70b": {"layers": 80, "hidden": 8192, "ffn": 28672, "heads": 64, "kv": 8, "vocab": 128256},
    "llama3_1_405b": {"layers": 126, "hidden": 16384, "ffn": 53248, "heads": 128, "kv": 8, "vocab": 128256},
    "qwen2_5_7b": {"layers": 28, "hidden": 3584, "ffn": 18944, "heads": 28, "kv": 4, "vocab": 152064},
    "qwen2_5_math_7b": {"layers": 28, "hidden": 3584, "ffn": 18944, "heads": 28, "kv": 4, "vocab": 152064},
    "qwen2_5_72b": {"layers": 80, "hidden": 8192, "ffn": 29568, "heads": 64, "kv": 8, "vocab": 152064},
    "qwen3_30b_a3b": {"layers": 48, "hidden": 2048, "ffn": 6144, "heads": 32, "kv": 4, "vocab": 151936},
    "qwen3_235b_a22b": {"layers": 94, "hidden": 4096, "ffn": 12288, "heads": 64, "kv": 4, "vocab": 151936},
}
EXPERT_FFN = {"qwen3_30b_a3b": 768, "qwen3_235b_a22b": 1536}


def _config(name: str) -> Any:
    if name == "deepseek_v3":
        return AutoConfig.for_model("deepseek_v3")  # its defaults are the published model
    sizes = CONFIGS[name]
    family = {"llama3": "llama", "qwen2": "qwen2", "qwen3": "qwen3_moe"}[name.split("_")[0]]
    extra: dict[str, Any] = {}
    if name in EXPERT_FFN:
        extra = {
            "moe_intermediate_size": EXPERT_FFN[name],
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "head_dim": 128,
        }
    return AutoConfig.for_model(
        family,
        num_hidden_layers=sizes["layers"],
        hidden_size=sizes["hidden"],
        intermediate_size=sizes["ffn"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv"],
        vocab_size=sizes["vocab"],
        tie_word_embeddings=False,
        **extra,
    )


@pytest.mark.parametrize("name", [*CONFIGS, "deepseek_v3"])
def test_parameters_equal_those_of_transformers(name: str) -> None:
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(_config(name))
    assert model(name).parameters() == sum(parameter.numel() for parameter in built.parameters())


def test_queries_of_latent_attention_may_be_whole() -> None:
    """As those of DeepSeek-V2-Lite."""
    config = AutoConfig.for_model(
        "deepseek_v2",
        num_hidden_layers=5,
        hidden_size=96,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=112,
        moe_intermediate_size=40,
        vocab_size=131,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=2,
        first_k_dense_replace=1,
        q_lora_rank=None,
        kv_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    sizes = {"layers": 5, "hidden": 96, "heads": 4, "head_dim": 16, "ffn": 112, "vocab": 131, "experts": 8}
    sizes |= {"topk": 2, "expert_ffn": 40, "shared_ffn": 80, "dense_layers": 1}
    shape = model("deepseek_v3", **sizes, q_rank=0, kv_rank=24, rope_dim=8)
    assert shape.parameters() == sum(parameter.numel() for parameter in built.parameters())


def test_every_preset_but_the_free_one_is_compared() -> None:
    assert set(MODELS) == {*CONFIGS, "deepseek_v3", "gpt"}


@pytest.mark.parametrize(
    ("name", "seq", "tokens", "tflops"),
    [  # Megatron-Bridge's tables: TFLOP/s over tokens/s is the FLOPs of a token
        ("llama3_1_8b", 8192, 14451, 744),
        ("llama3_1_70b", 8192, 1621, 728),
        ("llama3_1_405b", 8192, 326, 822),
        ("qwen3_30b_a3b", 4096, 8826, 203),
        ("qwen3_235b_a22b", 4096, 9015, 1335),
    ],
)
def test_flops_of_a_token_are_those_of_published_tables(
    name: str, seq: int, tokens: float, tflops: float
) -> None:
    assert model(name).flops_per_token(seq) == pytest.approx(tflops / tokens * 1e12, rel=0.005)


def test_flops_of_gpt_follow_the_formula_of_megatrons_paper() -> None:
    layers, hidden, vocab, seq = 84, 8192, 131072, 4096
    paper = 72 * layers * hidden**2 * (1 + seq / (6 * hidden) + vocab / (12 * layers * hidden))  # 2104.04473
    shape = model("gpt", layers=layers, hidden=hidden, heads=64)
    assert shape.flops_per_token(seq) == pytest.approx(paper, rel=1e-3)


def test_active_parameters_count_the_experts_of_a_token() -> None:
    assert model("qwen3_30b_a3b").active_parameters() / 1e9 == pytest.approx(3.0, abs=0.1)  # "A3B"
    assert model("qwen3_235b_a22b").active_parameters() / 1e9 == pytest.approx(21.6, abs=0.5)  # "A22B"
    assert model("deepseek_v3").active_parameters() / 1e9 == pytest.approx(37, abs=1)  # "37B activated"


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"heads": 5}, "not a multiple"),
        ({"layers": 0}, "expected 1 or above"),
        ({"experts": 8}, "topk"),
        ({"width": 3}, "unknown size model.width"),
        ({"kv_heads": 3}, "model.kv_heads=3"),
        (
            {"experts": 8, "topk": 2, "expert_ffn": 100, "shared_ffn": -50000},
            "model.shared_ffn=-50000, expec",
        ),
        ({"head_dim": -8}, "model.head_dim=-8, expected 0 or above"),
        ({"dense_layers": 40}, "model.dense_layers=40 of model.layers=24"),
        (
            {"experts": 8, "topk": 2, "expert_ffn": 9, "ffn": 0, "dense_layers": 1},
            "model.ffn=0 with model.den",
        ),
        ({"kv_rank": 5}, "model.kv_rank=5 with model.rope_dim=0"),
        ({"q_rank": 5}, "model.q_rank=5; expected"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        model("gpt", **sizes)
