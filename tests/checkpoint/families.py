"""Tiny models of every family, made by transformers with random weights; sizes are unequal and odd.

Every size allows tensor parallelism up to 4; 3 layers make pipeline stages uneven.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
HEAD_DIM = 10
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
DEEPSEEK: dict[str, Any] = SIZES | {
    "num_key_value_heads": 8,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 14,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}

MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, head_dim=HEAD_DIM)),
    "llama_tied": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(
            **SIZES | {"tie_word_embeddings": True, "max_position_embeddings": 16384},
            rope_parameters=LLAMA3_ROPE,
        )
    ),
    "llama_4_layers": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | {"num_hidden_layers": 4})),
    "qwen2": lambda: hf.Qwen2ForCausalLM(
        hf.Qwen2Config(**SIZES, head_dim=HEAD_DIM, rope_parameters={"rope_theta": 1e6})
    ),
    "qwen2_tied": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES | {"tie_word_embeddings": True})),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=HEAD_DIM)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, head_dim=HEAD_DIM, sliding_window=5)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **SIZES, head_dim=HEAD_DIM, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**SIZES, head_dim=HEAD_DIM, num_local_experts=4, num_experts_per_tok=2)
    ),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**DEEPSEEK)),
    "deepseek_v3_yarn": lambda: hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(**DEEPSEEK, rope_parameters=YARN)
    ),
}
MIXTURES = tuple(name for name in MODELS if name.startswith(("qwen3_moe", "mixtral", "deepseek")))
PROMPT = torch.tensor(
    [[3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46], [26, 43, 38, 32, 79, 50, 28, 84, 19, 71, 69]]
)


def save_model(name: str, folder: Path, dtype: torch.dtype = torch.float32, **save: Any) -> Tensor:
    """Write a random model of the family and return its logits in fp32 of PROMPT [2, 11, 101]."""
    torch.manual_seed(sorted(MODELS).index(name))
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # norms of one and biases of zero would hide a swap
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(3.0)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.copy_(0.1 * torch.randn_like(buffer))
    with torch.no_grad():
        logits: Tensor = model(PROMPT).logits
    model.to(dtype).save_pretrained(folder, **save)
    return logits
