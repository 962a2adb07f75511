"""The demo's real weights in Megatron give the logits of transformers, at the layouts its 9 heads allow.

Real text, because the model's fp32 round-off alone (against fp64) is 2e-3 on random tokens and 9e-5 here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpt_mega.checkpoint.hf import HFCheckpoint
from hpt_mega.checkpoint.weights import load_hf
from hpt_mega.config import Config, ParallelConfig
from tests.ranks import run_ranks

MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"
LENGTH = 21


TEXTS = (
    "Tom has 3 apples and buys 4 more, then gives two of them to Anna. How many apples are left for Tom?",
    "The ferry left the harbour at six in the morning, and the two brothers stood at the rail to watch.",
    "7 + 12 = 19, and 19 - 4 = 15, so the answer is 15. Now take three times eight, which makes 24, and",
)


def token_ids() -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return torch.tensor([tokenizer(text).input_ids[:LENGTH] for text in TEXTS])


@pytest.fixture(scope="module")
def expected() -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(token_ids()).logits


def megatron_logits(parallel: ParallelConfig) -> Tensor:
    """[B, S, V] on every rank of the last stage; an empty tensor elsewhere."""
    from hpt_mega.megatron import runtime
    from hpt_mega.megatron.model import build_model
    from hpt_mega.resharding.mapping import family_for

    layout = runtime.initialize(Config(parallel=parallel))
    checkpoint = HFCheckpoint(MODEL)
    family = family_for(checkpoint.config)
    shape = family.read_shape(checkpoint.config)
    model = build_model(shape, parallel, layout, torch.float32)
    load_hf(model, checkpoint, family, shape, layout)
    tokens = token_ids()
    with torch.no_grad(), model.inference():
        hidden = torch.empty(LENGTH, len(tokens), shape.hidden_size)
        if layout.pp_rank != 0:
            dist.recv(hidden, layout.stage_rank(layout.pp_rank - 1), layout.pp_group)
            model.set_input_tensor(hidden)
        hidden = model(tokens, torch.arange(LENGTH)[None], None)
        if not layout.is_last_stage:
            dist.send(hidden.contiguous(), layout.stage_rank(layout.pp_rank + 1), layout.pp_group)
            logits = torch.empty(0)
        else:
            part = hidden.transpose(0, 1) @ model.output_weight().t()
            shards = [torch.empty_like(part) for _ in range(layout.tp_size)]
            dist.all_gather(shards, part.contiguous(), group=layout.tp_group)
            logits = torch.cat(shards, dim=-1)[..., : shape.vocab_size]
    runtime.shutdown()
    return logits


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(tp=tp, pp=pp) for tp, pp in ((1, 1), (1, 2), (1, 3), (3, 1))],
    ids=lambda p: f"tp{p.tp}pp{p.pp}",
)
def test_the_logits_are_those_of_transformers(
    parallel: ParallelConfig, expected: Tensor, tmp_path: Path
) -> None:
    logits = run_ranks(megatron_logits, parallel.world_size, tmp_path, parallel)[-1]
    difference = (logits - expected).abs().max().item()
    print(f"largest difference {difference:.2e}, largest logit {expected.abs().max():.1f}")
    assert difference < 1e-4
