"""The search against a brute-force look at its own layouts, and mode rl against arithmetic by hand."""

from __future__ import annotations

import pytest

from hpt_mega.planning import Job, Layout, PlanError, hardware, memory, model, plan, search
from hpt_mega.planning.rollout import engine, kv_bytes_per_token


def test_what_is_found_fits_and_comes_fastest_first() -> None:
    gpu = hardware("h100")
    plans, refusals = search(model("llama3_1_70b"), Job(64), gpu)
    speeds = [found.tokens_per_s_per_gpu for found in plans]
    assert speeds == sorted(speeds, reverse=True)
    assert all(found.fits for found in plans)
    assert all(memory(model("llama3_1_70b"), Job(64), r.layout).total > 79.6 for r in refusals if r.over_gib)
    assert {found.layout for found in plans}.isdisjoint(refused.layout for refused in refusals)


def test_the_published_layout_of_70b_is_among_those_found() -> None:
    plans, _ = search(model("llama3_1_70b"), Job(64, precision="fp8"), hardware("h100"))
    assert Layout(tp=4, pp=8, vpp=5) in [found.layout for found in plans]


def test_a_model_too_large_for_its_gpus_is_refused_with_the_nearest_layout_first() -> None:
    plans, refusals = search(model("llama3_1_405b"), Job(16), hardware("h100"))
    assert not plans
    over = [refused.over_gib for refused in refusals if refused.over_gib]
    assert over == sorted(over)
    assert "GiB of 79.6" in refusals[0].reason


def test_more_memory_finds_at_least_as_fast_a_layout() -> None:
    job = Job(16)
    best = [search(model("qwen3_30b_a3b"), job, hardware(name))[0][0] for name in ("h100", "h200")]
    assert best[1].tokens_per_s_per_gpu >= best[0].tokens_per_s_per_gpu


def test_keys_and_values_of_llama_8b_take_128_kib_a_token() -> None:
    assert kv_bytes_per_token(model("llama3_1_8b"), 1) == 32 * 2 * 8 * 128 * 2 == 128 * 1024
    assert kv_bytes_per_token(model("llama3_1_8b"), 16) == 32 * 2 * 128 * 2  # a head is not cut


def test_decode_is_no_faster_than_memory_lets_it() -> None:
    shape, job, gpu = model("llama3_1_8b"), Job(8, batch=64, seq=4096, mode="rl"), hardware("h100")
    found = plan(shape, job, Layout(tp=2), gpu)
    used = engine(shape, job, gpu, found.memory)
    floor = (job.seq - job.prompt) * 2 * shape.parameters() / used.tp / 3.35e12
    assert floor < found.timing.parts["rollout_decode"] < 5 * floor
    assert found.timing.step > sum(found.timing.parts[part] for part in ("rollout_decode", "weight_sync"))


def test_a_step_of_rl_is_training_and_more() -> None:
    shape, gpu, layout = model("qwen2_5_math_7b"), hardware("h100"), Layout(tp=2)
    train = plan(shape, Job(8, batch=128, seq=4096), layout, gpu)
    whole = plan(shape, Job(8, batch=128, seq=4096, mode="rl"), layout, gpu)
    assert whole.timing.step > train.timing.step
    assert whole.timing.step == pytest.approx(sum(whole.timing.parts.values()))


def test_an_engine_without_room_for_a_sequence_is_refused() -> None:
    with pytest.raises(PlanError, match="raise rollout_tp"):
        plan(
            model("llama3_1_70b"),
            Job(64, batch=256, mode="rl", rollout_tp=1),
            Layout(tp=8, pp=2),
            hardware("h100"),
        )
