"""Bytes against a real megatron-core model's shards, Megatron-LM's own formula, and laws of the schedules."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpt_mega.planning import MODELS, Job, Layout, PlanError, memory, model
from hpt_mega.planning.job import layers_by_kind, stage_layers
from hpt_mega.planning.memory import GIB, activation_bytes, microbatches_in_flight, stage_shards

SHARD = Path(__file__).parent / "megatron_shard.py"
LLAMA = {
    "num_layers": 80,
    "hidden_size": 8192,
    "ffn_hidden_size": 28672,
    "num_attention_heads": 64,
    "num_query_groups": 8,
    "gated_linear_unit": True,
}
QWEN = {
    "num_layers": 48,
    "hidden_size": 2048,
    "ffn_hidden_size": 768,
    "moe_ffn_hidden_size": 768,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "num_query_groups": 4,
    "gated_linear_unit": True,
    "num_moe_experts": 128,
    "moe_router_topk": 8,
    "qk_layernorm": True,
    "moe_token_dispatcher_type": "alltoall",
}


@pytest.mark.parametrize(
    ("name", "sizes", "vocab", "layout", "stage"),
    [
        ("llama3_1_70b", LLAMA, 128256, Layout(4, 8), 0),
        ("llama3_1_70b", LLAMA, 128256, Layout(4, 8), 3),
        ("qwen3_30b_a3b", QWEN, 151936, Layout(2, 2, ep=8), 1),
    ],
)
def test_a_ranks_parameters_are_those_of_a_real_megatron_model(
    name: str, sizes: dict[str, int], vocab: int, layout: Layout, stage: int
) -> None:
    world = 64
    arguments = [world, stage * world // layout.pp, layout.tp, layout.pp, layout.ep, json.dumps(sizes), vocab]
    run = subprocess.run(
        [sys.executable, SHARD, *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr[-2000:]
    real = json.loads(run.stdout.splitlines()[-1])
    shard = stage_shards(model(name), layout)[stage]
    assert shard.dense == pytest.approx(real["dense"], rel=0.01)
    assert shard.experts == pytest.approx(real["experts"], rel=1e-9)


@pytest.mark.parametrize(("name", "gpus", "tp", "pp"), [("llama3_1_70b", 64, 4, 8), ("llama3_1_8b", 8, 2, 1)])
def test_weights_and_optimizer_take_what_megatrons_own_formula_says(
    name: str, gpus: int, tp: int, pp: int
) -> None:
    """Megatron-LM, training/theoretical_memory_usage.py: 6 + 12/dp bytes of the most loaded shard."""
    shape = model(name)
    embedding = shape.vocab * shape.hidden
    block = shape.parameters() - 2 * embedding
    shard = (block / pp + embedding * (2 if pp == 1 else 1)) / tp
    expected = shard * (6 + 12 / (gpus / tp / pp)) / GIB
    found = memory(shape, Job(gpus), Layout(tp, pp))
    assert found.weights + found.gradients + found.optimizer == pytest.approx(expected, rel=0.03)


def test_activations_are_those_of_korthikanti_for_a_plain_gpt() -> None:
    """arXiv 2205.05198, table 2, attention's scores not kept: 34 s b h / t, of which 2 are dropout masks."""
    shape = model("gpt", hidden=6144, heads=48)
    kept = activation_bytes(shape, Job(8), Layout(4), moe=False)
    assert kept == pytest.approx(32 * 6144 / 4)


@settings(max_examples=60)
@given(
    st.integers(1, 70),
    st.integers(1, 8),
    st.integers(1, 5),
    st.sampled_from(["gpt", "deepseek_v3", "llama3_1_405b"]),
)
def test_stages_hold_every_layer_once_and_differ_by_one_layer_at_most(
    layers: int, pp: int, vpp: int, name: str
) -> None:
    layers = max(layers, pp * vpp)
    shape = model(name, layers=layers, dense_layers=min(layers, MODELS[name].dense_layers))
    layout = Layout(pp=pp, vpp=vpp)
    stages = stage_layers(shape, layout)
    assert sum(stages) == shape.layers
    assert max(stages) - min(stages) <= 1
    kinds = layers_by_kind(shape, layout)
    assert sum(experts for _, experts in kinds) == shape.moe_layers
    assert [dense + experts for dense, experts in kinds] == stages


def test_shards_of_all_ranks_add_up_to_the_model() -> None:
    shape, layout = model("qwen3_235b_a22b"), Layout(tp=4, pp=2, ep=8)
    shards = stage_shards(shape, layout)
    whole = sum(4 * shard.dense + 8 * shard.experts for shard in shards)
    assert whole == pytest.approx(shape.parameters(), rel=1e-5)


def test_recompute_saves_memory_step_by_step() -> None:
    totals = [
        memory(model("llama3_1_70b"), Job(64), Layout(4, 4, recompute=mode)).activations
        for mode in ("none", "selective", "full")
    ]
    assert totals[0] > totals[1] > totals[2] > 0


def test_a_replicated_optimizer_takes_twelve_bytes_a_parameter() -> None:
    shape = model("llama3_1_8b")
    found = memory(shape, Job(8, distributed_optimizer=False), Layout())
    assert found.optimizer * GIB == pytest.approx(12 * shape.parameters(), rel=1e-4)


def test_numbers_of_fp32_take_twice_the_room_and_its_optimizer_keeps_no_copy_of_the_weights() -> None:
    shape = model("llama3_1_8b")
    half, full = (
        memory(shape, Job(8, distributed_optimizer=False, number_bytes=size), Layout()) for size in (2, 4)
    )
    assert full.weights == 2 * half.weights
    assert full.activations == 2 * half.activations
    assert full.optimizer * GIB == pytest.approx(8 * shape.parameters(), rel=1e-4)
    # 4 weight + 4 gradient + 8 moments, as 2 + 4 + 12 in bf16 less the bf16 copy
    assert full.held * GIB == pytest.approx(16 * shape.parameters(), rel=1e-4)


def test_micro_batches_in_flight_are_those_of_the_schedules() -> None:
    assert [microbatches_in_flight(Layout(pp=4), stage, 9) for stage in range(4)] == [4, 3, 2, 1]
    assert microbatches_in_flight(Layout(pp=4), 0, 2) == 2  # no more than there are
    assert microbatches_in_flight(Layout(pp=4, vpp=3), 0, 8) == pytest.approx(4 * (1 + 3 / 12))  # 2205.05198


@pytest.mark.parametrize(
    ("job", "layout", "words"),
    [
        (Job(64), Layout(tp=3), "does not divide the 64 heads"),
        (Job(60), Layout(tp=8), "does not divide gpus=60"),
        (Job(64), Layout(ep=2), "without experts"),
        (Job(64, batch=100), Layout(tp=2), "batch=100 is not a multiple"),
        (Job(64), Layout(vpp=2), "raise pp"),
        (Job(192), Layout(pp=96), "lower pp or vpp"),
        (Job(64, batch=136), Layout(pp=8, vpp=2), "expected a multiple of pp=8"),
        (Job(64), Layout(tp=0), "tp=0, expected 1"),
        (Job(64, seq=1001), Layout(tp=2), "seq=1001 cannot be cut"),
        (Job(64), Layout(recompute="some"), "none, selective or full"),
    ],
)
def test_impossible_layouts_say_what_to_change(job: Job, layout: Layout, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        memory(model("llama3_1_70b"), job, layout)
