"""The last check of a conversion: the Megatron model and transformers' give a prompt the same logits.

It builds both models whole, in fp32, in this process; swapped names of tensors of equal shape show here only.
A few changed values, or experts the prompt never visits, do not: comparing bits is convert.verify's business.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.checkpoint.hf import HFCheckpoint
from hpt_mega.resharding.mapping import MappingError, ModelShape, family_for

PROMPT = "Tom has 3 apples and buys 4 more, then gives two of them to Anna. How many apples are left for Tom?"
TOLERANCE = 1e-4  # of the logits' norm; round-off is 1e-6, a swap changes them by their own size
_LENGTH = 32


def check_logits(hf: Path, megatron: Path) -> float:
    """The difference's norm in units of the logits'. Raises MappingError where it is no round-off."""
    shape, tokens_BS = _shape_and_tokens(hf)
    expected = _transformers_logits(hf, tokens_BS)
    difference = (_megatron_logits(hf, megatron, shape, tokens_BS) - expected).norm() / expected.norm()
    if not difference < TOLERANCE:
        raise MappingError(
            f"logits differ from transformers' by {difference:.1e} of their norm, expected below "
            f"{TOLERANCE}; tensors of equal shape may have each other's names"
        )
    return float(difference)


def _shape_and_tokens(hf: Path) -> tuple[ModelShape, Tensor]:
    config = HFCheckpoint(hf).config
    shape = family_for(config).read_shape(config)
    if any((hf / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        from transformers import AutoTokenizer

        return shape, torch.tensor([AutoTokenizer.from_pretrained(hf)(PROMPT).input_ids[:_LENGTH]])
    generator = torch.Generator().manual_seed(0)
    return shape, torch.randint(shape.vocab_size, (1, _LENGTH), generator=generator)


@torch.no_grad()
def _transformers_logits(hf: Path, tokens_BS: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    logits: Tensor = model(tokens_BS).logits
    return logits


@torch.no_grad()
def _megatron_logits(hf: Path, megatron: Path, shape: ModelShape, tokens_BS: Tensor) -> Tensor:
    from hpt_mega.checkpoint.weights import load_megatron
    from hpt_mega.config import Config, ParallelConfig
    from hpt_mega.launch import single_rank_environment
    from hpt_mega.megatron import runtime
    from hpt_mega.megatron.model import build_model

    parallel = ParallelConfig(tp=1, pp=1)
    os.environ |= single_rank_environment()
    layout = runtime.initialize(Config(parallel=parallel))
    try:
        family = family_for(HFCheckpoint(hf).config)
        model = build_model(shape, parallel, layout, torch.float32)
        load_megatron(model, megatron, family, shape, layout)
        device = next(model.parameters()).device
        with model.inference():
            positions = torch.arange(tokens_BS.shape[1], device=device)[None]
            hidden_SBH = model(tokens_BS.to(device), positions, None)
            logits: Tensor = (hidden_SBH.transpose(0, 1) @ model.output_weight().t()).cpu()
    finally:
        runtime.shutdown()
    assert not dist.is_initialized()
    return logits[..., : shape.vocab_size]
