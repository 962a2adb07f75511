"""Transformer Engine's layers computing on a GPU: every family and precision beside transformers in fp64.

    PYTHONPATH=. python bench/gpu_layers.py --out bench/results/gpu_layers.md

Small models with random weights, the same in all columns. Compared are the log-probabilities of the
response tokens of packed sequences of unequal lengths (latent attention takes one), and the gradient of their
mean; beside ours stands what transformers loses itself when it computes in bf16. Needs an NVIDIA GPU and
Transformer Engine.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests

import _gpu
import torch
import transformers as hf
from precision import learner_of
from torch import Tensor

from hpt_mega.checkpoint.hf import HFCheckpoint
from hpt_mega.checkpoint.weights import own_entries
from hpt_mega.config import Fp8Config, compose
from hpt_mega.doctor import fp8_recipes
from hpt_mega.megatron import runtime
from hpt_mega.megatron.step import forward_backward
from hpt_mega.trajectory import Source, Trajectory
from tests.checkpoint.families import LLAMA3_ROPE
from tests.megatron.tiny import named_gradients

VOCABULARY = 512
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 16384,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = SIZES | {"num_experts_per_tok": 2}
DEEPSEEK: dict[str, Any] = {name: size for name, size in SIZES.items() if name != "head_dim"} | {
    "num_key_value_heads": 8,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
}
MODELS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "llama, tied, scaled rotation": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**SIZES | {"tie_word_embeddings": True}, rope_parameters=LLAMA3_ROPE)
    ),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES)),
    "mistral, window 16": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=16)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=256)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**EXPERTS, num_local_experts=4)),
    "deepseek_v3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**DEEPSEEK)),
}
LENGTHS = (70, 33, 121, 96, 17, 50)
PROMPT = 5

Outcome = tuple[Tensor, dict[str, Tensor]]  # log-probabilities of all response tokens, gradients by HF name


def save(name: str, folder: Path) -> None:
    """A random model that bf16 holds exactly, with norms away from one."""
    torch.manual_seed(sorted(MODELS).index(name))
    model = MODELS[name]()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.7, 1.3)
            elif parameter.ndim > 1:
                parameter.mul_(3.0)
    model.to(torch.bfloat16).save_pretrained(folder)


def sequences(model_type: str) -> list[Trajectory]:
    generator = torch.Generator().manual_seed(5)
    lengths = LENGTHS[:1] if model_type == "deepseek_v3" else LENGTHS
    rows = [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [
        Trajectory(tuple(row[:PROMPT]), tuple(row[PROMPT:]), i, Source.OFFLINE, 0)
        for i, row in enumerate(rows)
    ]


def by_transformers(folder: Path, dtype: torch.dtype) -> Outcome:
    model: Any = hf.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    )
    model = model.cuda().train()
    logps = []
    for trajectory in sequences(model.config.model_type):
        tokens = torch.tensor([*trajectory.prompt_tokens, *trajectory.response_tokens], device="cuda")
        logits_SV = model(tokens[None]).logits[0, PROMPT - 1 : -1]
        wide = torch.promote_types(dtype, torch.float32)
        logp_SV = torch.log_softmax(logits_SV.to(wide), dim=-1)
        logps.append(logp_SV.gather(1, tokens[PROMPT:, None])[:, 0])
    found = torch.cat(logps)
    (-found.mean()).backward()
    gradients = {name: tensor.double().cpu() for name, tensor in named_gradients(model).items()}
    return found.detach().double().cpu(), gradients


def by_us(folder: Path, dtype: str, fp8: Fp8Config) -> Outcome:
    learner, family, shape = learner_of(folder, fp8, 1, dtype)
    try:
        batch = sequences(HFCheckpoint(folder).config["model_type"])
        if fp8.recipe == "delayed":
            learner.logprobs(batch)  # its first scales are 1
        logp = torch.tensor([x for row in learner.logprobs(batch) for x in row], dtype=torch.float64)
        learner.policy.zero_grad_buffer()
        objective = learner._objective(float(len(logp)))
        forward_backward(learner.policy, [learner._collate(batch)], objective, learner.layout)
        gradients: dict[str, Tensor] = {}
        for entry, parameter in own_entries(learner.policy.module, family, shape):
            gradient = getattr(parameter, "main_grad", None)
            if gradient is None:  # a buffer: the selection bias of experts
                continue
            whole = entry.fusion.merge([gradient.double().cpu()], shape)
            gradients |= dict(zip(map(_name_in_module, entry.hf), whole, strict=True))
        return logp, gradients
    finally:
        runtime.shutdown()


def _name_in_module(name: str) -> str:
    """Mixtral's checkpoint names other modules than transformers has."""
    if ".block_sparse_moe." not in name:
        return name
    for ours, theirs in ((".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj.")):
        name = name.replace(ours, theirs)
    return name.replace(".block_sparse_moe.", ".mlp.")


def errors(found: Outcome, right: Outcome) -> tuple[float, float]:
    """Mean distance of a log-probability; distance of the whole gradient beside its norm."""
    names = sorted(right[1])
    ours, theirs = (torch.cat([outcome[1][name].flatten() for name in names]) for outcome in (found, right))
    return float((found[0] - right[0]).abs().mean()), float((ours - theirs).norm() / theirs.norm())


def precisions() -> dict[str, tuple[str, Fp8Config]]:
    """Those that this GPU has kernels for."""
    major, minor = torch.cuda.get_device_capability()
    able = fp8_recipes(major + minor / 10)
    fp8 = {f"fp8_{name}": ("bf16", compose([f"precision=fp8_{name}"]).precision.fp8) for name in able}
    return {"fp32": ("fp32", Fp8Config()), "bf16": ("bf16", Fp8Config()), **fp8}


def rows(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            save(name, folder)
            right = by_transformers(folder, torch.float64)
            cells = [cell(lambda: by_transformers(folder, torch.bfloat16), right)]  # noqa: B023
            for dtype, fp8 in precisions().values():
                cells.append(cell(lambda: by_us(folder, dtype, fp8), right))  # noqa: B023
        yield f"| {name} | {' | '.join(cells)} |"


def cell(compute: Callable[[], Outcome], right: Outcome) -> str:
    try:
        logp, gradient = errors(compute(), right)
        return f"{logp:.1e}, {gradient:.1e}"
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:80]}"
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    _gpu.require()
    columns = ["family", "transformers bf16", *(f"ours {name}" for name in precisions())]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    print("\n".join(lines), flush=True)
    for row in rows(options.models):
        lines.append(row)
        print(row, flush=True)
    if options.out:
        options.out.write_text(report(lines))


def report(lines: list[str]) -> str:
    return "\n".join(
        [
            "# Transformer Engine's layers on a GPU",
            "",
            _gpu.made_by("gpu_layers"),
            "",
            f"3 layers, hidden 256; {len(LENGTHS)} sequences of {min(LENGTHS)} to {max(LENGTHS)} tokens in "
            "one packed row (latent attention: one sequence). A cell: mean distance of a response token's "
            "log-probability from transformers in fp64, and the distance of the gradient of their mean, "
            "beside its norm.",
            "",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
