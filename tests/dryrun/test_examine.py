"""`hpt dryrun`: the experiments for GPUs are whole, and a broken job is refused with the reason."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

from hpt_mega.config import ConfigError, compose, conf_dir
from hpt_mega.data.balancing import plan_microbatches
from hpt_mega.dryrun.command import as_json, print_whole
from hpt_mega.dryrun.estimate import batch, planned_shape, stages
from hpt_mega.dryrun.examine import Findings, examine, typical_ranks
from hpt_mega.dryrun.rank import fake_job
from hpt_mega.megatron.critic import ValueModel
from hpt_mega.megatron.model import build_stage, transformer_config
from hpt_mega.planning import MODELS, hardware
from hpt_mega.planning.memory import GIB
from hpt_mega.resharding.mapping import ModelShape, family_for
from tests.checkpoint.families import DEEPSEEK

H100 = hardware("h100")
FULL_SIZE = compose(["experiment=hpt_7b", "gate=both"])


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield
    assert not torch.distributed.is_initialized(), "the fake job outlived the examination"


def dryrun(*overrides: str, ranks: list[int] | None = None) -> Findings:
    return examine(compose(overrides), H100, ranks)


def test_the_70b_experiment_holds_every_parameter_of_the_model() -> None:
    found = dryrun("experiment=hpt_70b")
    assert found.problems == []
    assert len(found.missing) == 3  # the model's folder and two data files
    assert [stage.total < H100.memory_gib for stage in found.stages] == [True] * 4
    # 70,553,706,496 numbers (the model card's 70.6 B); a norm is on all 8 tensor-parallel ranks of a stage
    held = sum(built.parameters * 8 for built in found.ranks)
    norms = (2 * 80 + 1) * 8192
    assert held - 7 * norms == 70_553_706_496
    assert json.loads(json.dumps(as_json(compose(["experiment=hpt_70b"]), found)))["world_size"] == 64


def test_a_stage_of_the_experts_model_holds_its_share_of_the_experts() -> None:
    first, last = dryrun("experiment=hpt_moe", ranks=[0, 255]).ranks
    assert (first.layers, last.layers) == (tuple(range(11)), tuple(range(83, 94)))
    assert {entry.expert for entry in first.entries.values()} == {None, *range(16)}
    assert {entry.expert for entry in last.entries.values()} == {None, *range(112, 128)}  # ep rank 7 of 8
    assert first.experts == 11 * 16 * 3 * 4096 * 1536


def test_typical_ranks_meet_every_stage_and_every_share_of_the_experts() -> None:
    parallel = compose(["experiment=hpt_moe"]).parallel
    ranks = typical_ranks(parallel)
    assert {rank // 32 for rank in ranks} == set(range(8))
    assert {rank % 8 for rank in ranks if rank < 32} == set(range(8))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("experiment=hpt_70b", "parallel.tp=6"), "parallel.tp is 6 and the model has 64 attention heads"),
        (
            ("experiment=hpt_70b", "rollout.server.urls=[http://a:1]"),
            "parallel.dp is 2; expec",
        ),
        (("experiment=hpt_70b", "rollout=megatron"), "is written for CPUs; set rollout=vllm"),
        (("experiment=hpt_moe", "parallel.ep=24"), "parallel.ep is 24 and the model has 128 experts"),
        (("experiment=hpt_70b", "trainer.questions_per_step=129"), "expected 128 or 130"),
        (("experiment=hpt_7b", "data.max_prompt_tokens=130000"), "the model has 131072 positions"),
        (("experiment=hpt_70b", "parallel.pp=81", "parallel.dp=1"), "has 80 layers; each chunk needs one"),
    ],
)
def test_a_contradiction_is_found_before_anything_is_built(overrides: tuple[str, ...], expected: str) -> None:
    found = dryrun(*overrides)
    assert expected in "\n".join(found.problems)
    assert found.ranks == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ("experiment=hpt_70b", "parallel.pp=1", "parallel.dp=1", "parallel.recompute=none"),
            "the largest part is optimizer",
        ),
        (
            ("experiment=hpt_70b", "parallel.recompute=none", "parallel.tp=4", "parallel.dp=4"),
            "parallel.recompute=full",
        ),
        (("experiment=hpt_70b", "rollout.server.gpu_memory_share=0.8"), "the largest part is engine with"),
        (
            ("experiment=hpt_7b", "rollout=megatron", "rollout.max_sequences=1000"),
            "the largest part is engine with",
        ),
    ],
)
def test_a_job_that_does_not_fit_is_told_by_its_largest_part(
    overrides: tuple[str, ...], expected: str
) -> None:
    (problem,) = dryrun(*overrides, ranks=[0]).problems
    assert "needs" in problem and "h100 has 79.6" in problem
    assert expected in problem


def test_a_server_that_cannot_hold_the_model_is_a_problem() -> None:
    beside = ("experiment=hpt_moe", "rollout.server.urls=[]", "rollout.server.gpu_memory_share=0.5")
    (problem,) = dryrun(*beside, ranks=[0]).problems
    # 235,093,634,560 parameters (the model card's 235 B) in 16 bits on 8 GPUs; half of 79.6 GiB
    assert "a server has 39.8 GiB of each GPU and needs 54.7 for weights" in problem


def test_memory_of_servers_elsewhere_or_asleep_is_the_trainers() -> None:
    def fullest(*overrides: str) -> float:
        return max(stage.total for stage in dryrun("experiment=hpt_70b", *overrides, ranks=[0]).stages)

    beside = fullest()
    elsewhere = fullest("rollout.server.urls=[http://a:1,http://b:1]")
    assert beside == pytest.approx(elsewhere + 0.5 * H100.memory_gib)
    assert elsewhere < fullest("rollout.server.sleep=true") < beside


def shape_of(name: str) -> ModelShape:
    config = json.loads((conf_dir() / f"model/published/{name}.json").read_text())
    return family_for(config).read_shape(config)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("pp", "dp"), [(1, 2), (2, 1)])
def test_a_critic_takes_what_its_real_model_with_gradients_and_optimizer_does(
    pp: int, dp: int, tied: bool
) -> None:
    cfg = compose(["experiment=hpt_7b", "algorithm=ppo", f"parallel.pp={pp}", f"parallel.dp={dp}"])
    shape = replace(shape_of("qwen2_5_7b"), tied=tied)
    found = stages(cfg, shape, H100)
    for index, stage in enumerate(found):
        with fake_job(index * 4 * dp, cfg.parallel) as layout, torch.device("meta"):
            config = transformer_config(shape, cfg.parallel, torch.bfloat16)
            untied = replace(shape, tied=False)
            critic = build_stage(untied, config, layout.tp_size, kind=ValueModel)
            parameters = sum(parameter.numel() for parameter in critic.parameters())
        expected = parameters * (2 + 4 + 12 / dp) / GIB
        assert stage.beside == {"critic": pytest.approx(expected, rel=1e-3)}


def test_the_models_beside_the_policy_are_parts_of_the_memory() -> None:
    def of(*overrides: str) -> dict[str, float]:
        job = ["experiment=hpt_7b", *overrides]
        (stage,) = as_json(compose(job), dryrun(*job, ranks=[0]))["stages"]
        return {str(part): float(gib) for part, gib in stage.items()}

    alone, ppo, grpo = of(), of("algorithm=ppo", "gate=rollouts"), of("algorithm=grpo", "gate=rollouts")
    held_to = of("algorithm=grpo", "gate=rollouts", "algorithm.kl_coef=0.1")
    assert grpo == alone
    assert ppo["total"] == pytest.approx(alone["total"] + ppo["critic"])
    assert held_to["reference"] == alone["weights"]
    assert held_to["total"] == pytest.approx(alone["total"] + alone["weights"])
    fp32 = of("precision=fp32")
    # the optimizer of fp32 weights keeps two of three numbers a parameter
    expected = {"weights": 2.0, "activations": 2.0, "gradients": 1.0, "optimizer": 2 / 3}
    assert {part: fp32[part] / alone[part] for part in expected} == pytest.approx(expected)


def test_a_server_of_fp32_weights_needs_four_bytes_a_parameter() -> None:
    beside = ("experiment=hpt_70b", "precision=fp32", "rollout.server.gpu_memory_share=0.4")
    # 70,553,706,496 parameters (the model card's 70.6 B) in 32 bits on 8 GPUs
    assert "needs 32.9 for weights" in "\n".join(dryrun(*beside, ranks=[0]).problems)


@pytest.mark.parametrize(
    ("gate", "sequences"),
    [
        ("rollouts", 16),
        ("switch", 16),  # rollouts or a demonstration
        ("both", 18),  # a demonstration beside the rollouts
        ("demonstrations", 2),
    ],
)
def test_an_update_has_the_questions_of_the_largest_part(gate: str, sequences: int) -> None:
    """Of 64 questions dealt out over 40 updates some have 2, each with 8 rollouts; one sequence a row."""
    job = ("experiment=hpt_7b", "parallel.dp=1", f"gate={gate}")
    cut = batch(compose([*job, "trainer.questions_per_step=64", "trainer.updates_per_step=40"]))
    assert cut.row == cut.longest
    assert cut.microbatches == sequences


@settings(max_examples=50, deadline=None)
@given(
    questions=st.integers(1, 40),
    updates=st.integers(1, 9),
    dp=st.integers(1, 3),
    vpp=st.integers(1, 2),
    row=st.sampled_from([9216, 20000, 30000]),
    shortest=st.sampled_from([1, 4000, 9216]),
    seed=st.integers(0, 9),
)
def test_no_update_has_more_micro_batches_than_announced(
    questions: int, updates: int, dp: int, vpp: int, row: int, shortest: int, seed: int
) -> None:
    cfg = replace(FULL_SIZE)
    cfg.parallel = replace(cfg.parallel, dp=dp, pp=2, vpp=vpp)
    cfg.trainer = replace(
        cfg.trainer, questions_per_step=questions * dp, updates_per_step=updates, tokens_per_microbatch=row
    )
    dealt = Counter(index * updates // (questions * dp) for index in range(questions * dp))
    rng = random.Random(seed)
    lengths = [rng.randint(shortest, 9216) for _ in range(9 * max(dealt.values()))]
    plan = plan_microbatches(lengths, row, dp, count_multiple=2 if vpp > 1 else 1)
    assert len(plan[0]) <= batch(cfg).microbatches
    if shortest == row:
        assert len(plan[0]) == batch(cfg).microbatches


def test_weights_that_are_here_are_compared_with_the_table(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=37,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    job = (f"model.path={tmp_path}", "parallel.pp=3", "experiment=demo", "rollout=vllm")
    assert dryrun(*job).problems == []
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    (problem,) = dryrun(*job).problems
    assert "model.layers.1.mlp.up_proj.weight" in problem


def test_weights_of_a_layer_that_predicts_further_tokens_are_no_problem(tmp_path: Path) -> None:
    # the planner counts values as wide as keys without positions, as those of DeepSeek-V3 are
    config = DeepseekV3Config(**DEEPSEEK | {"v_head_dim": 12, "num_nextn_predict_layers": 1})
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    save_file(load_file(weights) | {"model.layers.3.eh_proj.weight": torch.ones(48, 96)}, weights)
    job = ("experiment=demo", "rollout=vllm", f"model.path={tmp_path}", "parallel.pp=3")
    assert dryrun(*job, "data.max_prompt_tokens=30").problems == []


def test_a_feature_that_nothing_computes_is_a_problem_not_a_crash(tmp_path: Path) -> None:
    config: dict[str, Any] = json.loads((conf_dir() / "model/published/llama3_1_70b.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_bias": True}))
    (problem,) = dryrun("experiment=hpt_70b", f"model.path={tmp_path}").problems
    assert "attention_bias is True" in problem


def test_a_model_without_any_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config.json and model.published is ''"):
        dryrun(f"model.path={tmp_path}/absent")


@pytest.mark.parametrize("stages", [3, 40])
def test_a_table_that_is_too_wide_is_laid_on_its_side_and_no_number_is_cut(stages: int) -> None:
    console = Console(file=StringIO(), width=80)
    rows = [[f"column {i}" for i in range(12)], *([f"{i}.{j}" for j in range(12)] for i in range(stages))]
    print_whole(rows, "title", console)
    assert isinstance(console.file, StringIO)
    printed = console.file.getvalue()
    for row in rows:
        for cell in row:
            assert f" {cell} " in printed
    assert "…" not in printed
    assert (max(map(len, printed.splitlines())) <= 80) == (stages == 3)


def test_a_rank_outside_the_job_is_refused() -> None:
    with pytest.raises(ConfigError, match="--ranks 64"):
        dryrun("experiment=hpt_70b", ranks=[64])


@pytest.mark.parametrize("name", ["llama3_1_70b", "qwen2_5_7b", "qwen3_235b_a22b"])
def test_the_published_shape_is_the_planners(name: str) -> None:
    assert planned_shape(shape_of(name)).parameters() == MODELS[name].parameters()
