"""Decoding a token at a time beside the model's own forward of whole sequences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from hpt_mega.config import Fp8Config, ParallelConfig, PrecisionConfig
from hpt_mega.lab import models
from hpt_mega.megatron.attention import CoreAttention, causal_attention
from hpt_mega.megatron.decoding import Decoding, KVCache, _is_plain, hidden_slots, with_decoding
from tests.checkpoint.jobs import Job, start
from tests.megatron.tiny import Policy, build_policy, config, leave_job, save_mixture, save_uneven
from tests.ranks import run_ranks
from tests.resharding.test_fusion import SHAPE

PROMPTS = ((3, 4, 5), (6, 7, 8, 9, 10, 11, 12), (2,))
NEW_TOKENS = 9


def save(folder: Path, family: str) -> Path:
    """Llama without biases, Qwen2 with them, Qwen3 with norms of queries and keys, or one with experts."""
    if family == "mixture":
        return save_mixture(folder)
    if family != "qwen3":
        models.save(folder, family, "1m", seed=5)
        return folder
    torch.manual_seed(5)
    shape = {**models.SIZES["1m"], "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 21}
    model = Qwen3ForCausalLM(Qwen3Config(**shape, max_position_embeddings=64, dtype="float32"))
    return save_uneven(model, folder)


PRECISIONS = {
    "fp32": PrecisionConfig("fp32"),
    "bf16": PrecisionConfig("bf16"),
    "fp8": PrecisionConfig("bf16", fp8=Fp8Config(recipe="blockwise")),
}


def gaps(folder: Path, precision: str) -> tuple[float, float]:
    """Between the engine's log-probabilities and those of one forward: the largest, and the mean.

    With one thread and with two, for which some products are made differently.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from hpt_mega.rollout.engine import SamplingParams
    from hpt_mega.rollout.megatron import MegatronEngine

    cfg = config(ParallelConfig(1, 1, 1))
    cfg.precision = PRECISIONS[precision]
    policy = build_policy(folder, cfg, train=False)
    size = policy.shape.vocab_size
    engine = MegatronEngine(policy.model, policy.layout, vocab_size=size, max_sequences=16)
    products = [m for m in policy.model.decoder.modules() if isinstance(m, ColumnParallelLinear)]
    assert all(_is_plain(product) == (precision != "fp8") for product in products) and products
    found: list[Tensor] = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        samples = engine.generate(PROMPTS, SamplingParams(n=2, max_new_tokens=NEW_TOKENS, seed=4))
        for prompt, group in zip(PROMPTS, samples, strict=True):
            for sample in group:
                expected = whole_sequence(policy, prompt, sample.tokens)
                found.append((expected - torch.tensor(sample.logp)).abs())
    leave_job()
    gap = torch.cat(found)
    return float(gap.max()), float(gap.mean())


def whole_sequence(policy: Policy, prompt: tuple[int, ...], response: tuple[int, ...]) -> Tensor:
    """The response's log-probabilities by one forward of the model's modules."""
    tokens = torch.tensor([[*prompt, *response]])
    with torch.no_grad(), policy.model.inference():
        hidden = policy.model(tokens, torch.arange(tokens.shape[1])[None], None)[:, 0]
        logits = hidden[len(prompt) - 1 : -1] @ policy.model.output_weight().t()
    logp = torch.log_softmax(logits[:, : policy.shape.vocab_size].float(), -1)
    return logp[range(len(response)), list(response)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixture"])
def test_a_token_at_a_time_gives_the_log_probabilities_of_the_whole_sequence(
    family: str, tmp_path: Path
) -> None:
    ((largest, _),) = run_ranks(gaps, 1, tmp_path, save(tmp_path / "model", family), "fp32")
    assert largest < 2e-5


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 3e-3), ("fp8", 0.02)])
def test_in_low_precision_they_differ_by_its_round_off(precision: str, bound: float, tmp_path: Path) -> None:
    ((_, mean),) = run_ranks(gaps, 1, tmp_path, save(tmp_path / "model", "qwen2"), precision)
    print(f"{precision}: mean log-prob difference {mean:.1e}")
    assert mean < bound


def attention_of_shared_spec() -> list[tuple[str, bool]]:
    """The layers' core attentions, and whether each is lent a cache, where a GPU seems to be here.

    megatron-core's own layers stand in for TE's: both are one spec for all layers.
    """
    from hpt_mega.megatron import model

    make = model.get_gpt_decoder_block_spec
    layout = start(Job())
    config = model.transformer_config(replace(SHAPE, num_layers=3), ParallelConfig(1, 1, 1), torch.bfloat16)
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(
            model,
            "get_gpt_decoder_block_spec",
            lambda *given, **named: make(*given, **named | {"use_transformer_engine": False}),
        ),
    ):
        layers = model.block_spec(config).layer_specs
    assert layout.world_size == 1 and layers[0] is layers[2]
    cores = [layer.submodules.self_attention.submodules.core_attention for layer in layers]
    return [(core.__name__, issubclass(core, Decoding)) for core in cores]


def test_layers_that_share_a_spec_get_the_cache_once(tmp_path: Path) -> None:
    (found,) = run_ranks(attention_of_shared_spec, 1, tmp_path)
    assert found == [("DecodingDotProductAttention", True)] * 3


def test_a_prompt_fills_the_cache_lent_to_its_attention() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(4, 3, heads, 5, generator=generator) for heads in (6, 2, 2))
    attention: Any = with_decoding(CoreAttention)(SimpleNamespace(context_parallel_size=1), 1)
    assert torch.equal(attention(query, key, value), causal_attention(query, key, value))
    attention.cache = KVCache(*(torch.full((3, 2, 6, 5), 7.0) for _ in range(2)))
    assert torch.equal(attention(query, key, value), causal_attention(query, key, value))
    for cached, given in ((attention.cache.keys_BGLD, key), (attention.cache.values_BGLD, value)):
        assert torch.equal(cached[:, :, :4], given.permute(1, 2, 0, 3))
        assert (cached[:, :, 4:] == 7).all()


def test_slots_between_a_prompt_and_the_longest_one_are_hidden() -> None:
    hidden = hidden_slots(torch.tensor([2, 4, 1]), slots=6, dtype=torch.float32)
    assert hidden.shape == (3, 1, 1, 6)
    assert torch.isinf(hidden[:, 0, 0]).int().tolist() == [
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
    ]


def test_selected_rows_of_the_cache_keep_their_keys() -> None:
    keys, values = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    cache = KVCache(keys, values)
    cache.select(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.keys_BGLD, torch.stack([keys[2], keys[0], keys[0]]))
    assert torch.equal(cache.values_BGLD, torch.stack([values[2], values[0], values[0]]))
