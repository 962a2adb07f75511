"""A tiny Llama of unequal sizes, as a Hugging Face folder and in Megatron, and its gradients by HF names.

No tests live here; test_layouts, test_optimizer, test_state and rollout/test_megatron_engine share it.
"""

from __future__ import annotations

import os
import socket
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hpt_mega.config import Config, OptimizerConfig, ParallelConfig, PrecisionConfig

VOCABULARY = 97  # odd: tensor-parallel ranks pad it
LAYERS = 6


def save_llama(folder: Path, *, tied: bool, vocabulary: int = VOCABULARY) -> Path:
    """Random weights that matter: large enough to bend the softmax, norms away from 1."""
    torch.manual_seed(11)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=12,
            num_key_value_heads=6,
            head_dim=6,
            intermediate_size=84,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
            initializer_range=0.15,
            dtype="float32",
        )
    )
    return save_uneven(model, folder)


def save_mixture(folder: Path) -> Path:
    """A tiny Qwen3-MoE, likewise: 4 experts, 2 of them a token, in every layer."""
    torch.manual_seed(12)
    model = Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=VOCABULARY,
            hidden_size=48,
            num_hidden_layers=4,
            num_attention_heads=12,
            num_key_value_heads=6,
            head_dim=6,  # type: ignore[call-arg]  # transformers reads it and does not declare it
            intermediate_size=84,
            moe_intermediate_size=20,
            num_experts=4,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            max_position_embeddings=128,
            initializer_range=0.15,
            dtype="float32",
        )
    )
    return save_uneven(model, folder)


def save_uneven(model: PreTrainedModel, folder: Path) -> Path:
    """With norms away from 1, so that leaving one out shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.7, 1.3)
    model.save_pretrained(folder)
    return folder


def load_mixture(folder: Path) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def named_gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The gradients of a transformers model by the names of its checkpoint, which holds each expert apart."""
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        experts, _, matrix = name.rpartition(".experts.")
        if not experts:
            found[name] = parameter.grad
            continue
        for number, gradient in enumerate(parameter.grad):
            parts = gradient.chunk(2) if matrix == "gate_up_proj" else [gradient]
            names = ("gate_proj", "up_proj") if matrix == "gate_up_proj" else ("down_proj",)
            for part_name, part in zip(names, parts, strict=True):
                found[f"{experts}.experts.{number}.{part_name}.weight"] = part
    return found


def load_llama(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@dataclass
class Policy:
    """One rank's part of the tiny model in Megatron."""

    cfg: Config
    layout: Any
    family: Any
    shape: Any
    model: Any
    wrapped: Any
    optimizer: Any

    def entries(self) -> list[tuple[Any, Any]]:
        from hpt_mega.checkpoint.weights import own_entries

        return [found for chunk in self.model.chunks for found in own_entries(chunk, self.family, self.shape)]

    def weights(self) -> dict[str, Tensor]:
        """Whole tensors of this rank's pipeline stage by HF name."""
        return self._whole({entry.megatron: parameter.detach() for entry, parameter in self.entries()})

    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients of this rank's pipeline stage by HF name; frozen parameters have none."""
        if self.cfg.parallel.distributed_optimizer:
            self._gather_gradient_shards()
        trained = [(entry, parameter) for entry, parameter in self.entries() if parameter.requires_grad]
        return self._whole({entry.megatron: parameter.main_grad for entry, parameter in trained})

    def save(self, folder: Path) -> None:
        """Write the state that load_state reads."""
        from hpt_mega.megatron.state import begin_save

        writer = begin_save(folder, self.model, self.optimizer, {}, self.layout, self.cfg)
        writer.write()
        writer.complete()

    def set_gradients(self, seed: int) -> None:
        """A gradient that follows from seed and HF name alone, whatever the layout."""
        for entry, parameter in self.entries():
            if not parameter.requires_grad:
                continue
            whole = self._whole({entry.megatron: parameter.detach()})
            drawn = [given_gradient(name, tensor.shape, seed) for name, tensor in whole.items()]
            group = self._cut_over(entry)
            place = (group.rank(), group.size())
            part = entry.fusion.shard(drawn, self.shape, *place)
            parameter.main_grad.copy_(part)

    def _whole(self, mine: dict[str, Tensor]) -> dict[str, Tensor]:
        """Merge tensor-parallel parts; replicated ones must be the same on all ranks."""
        found: dict[str, Tensor] = {}
        for entry, _ in self.entries():
            if entry.megatron not in mine:
                continue
            part = mine[entry.megatron].contiguous()
            group = self._cut_over(entry)
            shards = [torch.empty_like(part) for _ in range(group.size())]
            dist.all_gather(shards, part, group=group)
            if part.dim() == 1:
                for other in shards[1:]:
                    torch.testing.assert_close(other, shards[0], rtol=1e-4, atol=1e-6)
            merged = entry.fusion.merge(shards, self.shape)
            found |= {name: t.clone() for name, t in zip(entry.hf, merged, strict=True)}
        return found

    def _cut_over(self, entry: Any) -> Any:
        """The group whose ranks hold the parts of a parameter."""
        from megatron.core import parallel_state

        expert = entry.expert is not None
        return parallel_state.get_expert_tensor_parallel_group() if expert else self.layout.tp_group

    def _gather_gradient_shards(self) -> None:
        """Each data-parallel rank holds the sum for its share of a bucket only."""
        buffers = [b for chunk in self.wrapped.chunks for b in chunk.buffers + chunk.expert_parallel_buffers]
        for buffer in buffers:
            group = buffer.data_parallel_group
            for bucket in buffer.buckets:
                share = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, share, group=group)


def given_gradient(name: str, shape: torch.Size, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator)


def config(
    parallel: ParallelConfig, *, dtype: str = "fp32", optimizer: OptimizerConfig | None = None
) -> Config:
    return Config(
        parallel=parallel, precision=PrecisionConfig(dtype), optimizer=optimizer or OptimizerConfig()
    )


def build_policy(folder: Path, cfg: Config, *, train: bool = True) -> Policy:
    """Join the job and load the model; call leave_job() when done with it."""
    from hpt_mega.checkpoint.hf import HFCheckpoint
    from hpt_mega.checkpoint.weights import load_hf
    from hpt_mega.megatron import runtime
    from hpt_mega.megatron.model import DTYPES, build_model
    from hpt_mega.megatron.optimizer import build_optimizer, wrap_data_parallel
    from hpt_mega.resharding.mapping import family_for

    layout = runtime.initialize(cfg)
    checkpoint = HFCheckpoint(folder)
    family = family_for(checkpoint.config)
    shape = family.read_shape(checkpoint.config)
    precision = cfg.precision
    model = build_model(shape, cfg.parallel, layout, DTYPES[precision.dtype], fp8=precision.fp8)
    load_hf(model, checkpoint, family, shape, layout)
    wrapped: Any = wrap_data_parallel(model, cfg) if train else None
    optimizer = build_optimizer(wrapped, cfg) if train else None
    return Policy(cfg, layout, family, shape, model, wrapped, optimizer)


def leave_job() -> None:
    """Shut the job down and agree on a new port, so that the same processes can form the next one.

    On the old port a fast rank would find the old job's store, just before that goes away.
    """
    from hpt_mega.megatron import runtime

    box = [0]
    if dist.get_rank() == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            box = [probe.getsockname()[1]]
    dist.broadcast_object_list(box, src=0)
    runtime.shutdown()
    os.environ["MASTER_PORT"] = str(box[0])
