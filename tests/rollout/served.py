"""Small models that vLLM's CPU kernels take, and a trainer that brings a running server to their weights.

No tests live here; test_vllm.py and bench/engine_matrix.py use it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from hpt_mega.config import ParallelConfig
from hpt_mega.rollout.vllm import ServerSettings, VLLMClient, VLLMServer
from tests.megatron.tiny import build_policy, config

VOCABULARY = 149  # odd: padded by tensor-parallel ranks, otherwise than by the engine
Parallel = dict[str, int]

PROMPTS = ((3, 141, 59, 26, 53), (2, 71, 82, 81, 8, 28, 45, 90, 45), (14,))
RESPONSES = ((58, 97, 93, 23), (84, 6, 2, 64, 33, 83), (27, 95, 2, 88, 41, 97, 16))
SCALE = 1.07  # from the weights the server was started with to those it must serve

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "head_dim": 32,  # the least vLLM's CPU attention knows
    "intermediate_size": 192,
    "max_position_embeddings": 128,
    "initializer_range": 0.12,
    "dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": None,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}


def shape_of(family: str, tied: bool) -> PreTrainedConfig:
    sizes = SIZES | {"tie_word_embeddings": tied}
    if family == "llama":
        return LlamaConfig(**sizes)
    if family == "qwen2":
        return Qwen2Config(**(sizes | {"num_attention_heads": 6, "hidden_size": 192}))
    if family == "qwen3":
        return Qwen3Config(**sizes)
    assert family == "qwen3_moe"
    return Qwen3MoeConfig(**sizes, **EXPERTS)


def save_models(folder: Path, family: str, *, tied: bool) -> tuple[Path, Path]:
    """A random model as the engine is started with, and as the trainer has it; both Hugging Face folders."""
    torch.manual_seed(17)
    model = AutoModelForCausalLM.from_config(shape_of(family, tied))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.7, 1.3)
            if name.endswith("bias"):
                parameter.uniform_(-0.2, 0.2)
    paths = folder / "before", folder / "after"
    model.save_pretrained(paths[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(SCALE).add_(torch.randn_like(parameter), alpha=0.01)
    model.save_pretrained(paths[1])
    return paths


def server(folder: Path, log: Path, *, tp: int = 1, **environment: str) -> VLLMServer:
    settings = ServerSettings(
        model=folder,
        dtype="float32",
        max_model_len=64,
        max_sequences=16,
        tp=tp,
        seed=0,
        kv_cache_gib=1,
        gpu_memory_share=0.5,
        logp_at_temperature=False,
    )
    environment = {"OMP_NUM_THREADS": "1", **environment}
    return VLLMServer(log.stem, replace(settings), log, 120.0, environment=environment)


def process_of(server: VLLMServer) -> psutil.Process:
    """The server itself, which its guard runs."""
    assert server._process is not None
    (process,) = psutil.Process(server._process._guard.pid).children()
    return process


def bring(client: VLLMClient, folder: Path, parallel: Parallel, bucket_bytes: int, version: int) -> int:
    """One rank of a trainer with `folder`'s weights sends them to the server; returns how many buckets."""
    from hpt_mega.rollout.sync import WeightSync
    from tests.megatron.tiny import leave_job

    policy = build_policy(folder, config(ParallelConfig(**parallel)), train=False)
    sync = WeightSync(policy.model, policy.family, policy.shape, policy.layout, bucket_bytes)
    if policy.layout.is_leader:
        client.connect(sync.path, sync.plan)
    sync.send([client] if policy.layout.is_leader else [], version)
    sync.close()
    leave_job()
    return len(sync.plan.buckets)


def reference_logp(folder: Path) -> list[list[float]]:
    """Log-probabilities of RESPONSES by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    found = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        tokens = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logp = torch.log_softmax(model.eval()(tokens).logits[0], dim=-1)
        chosen = logp[:-1].gather(1, tokens[0, 1:, None])[:, 0]
        found.append(chosen[-len(response) :].tolist())
    return found


def largest_gap(client: VLLMClient, expected: list[list[float]]) -> float:
    """Between the engine's log-probabilities of RESPONSES and those expected."""
    found = [client.logp(*texts) for texts in zip(PROMPTS, RESPONSES, strict=True)]
    return max(
        abs(a - b)
        for one, other in zip(found, expected, strict=True)
        for a, b in zip(one, other, strict=True)
    )
