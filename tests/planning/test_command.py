"""The verb `hpt plan`: the lines of the architecture's page, JSON, tables, and refusals of one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hpt_mega.cli import main

GIVEN = (
    "plan model=gpt model.layers=84 model.hidden=8192 model.heads=64 model.ffn=32768 model.vocab=131072 "
    "model.gated=false hardware=h100 gpus=768 parallel.tp=8 parallel.pp=2 parallel.vpp=1 parallel.cp=1 "
    "parallel.ep=1 precision=bf16 batch=384 seq=4096 mode=pretrain"
)


def test_a_given_layout_is_judged_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GIVEN.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"memory_gib", "tokens_per_s_per_gpu", "tflops_per_gpu", "step_s", "breakdown"}
    assert found["tflops_per_gpu"] == pytest.approx(419.7, rel=0.15)  # Megatron-LM's README
    assert sum(found["breakdown"]["step_s"].values()) == pytest.approx(found["step_s"])
    assert sum(found["breakdown"]["memory_gib"].values()) == pytest.approx(found["memory_gib"])
    assert found["tokens_per_s_per_gpu"] * found["step_s"] * 768 == pytest.approx(384 * 4096)


def test_a_search_prints_layouts_and_why_others_were_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=llama3_1_70b", "hardware=h100", "gpus=64"]) == 0
    printed = capsys.readouterr().out
    for words in ("tokens/s", "tp8", "activations", "pp_bubble", "refused", "GiB of 79.6"):
        assert words in printed


def test_rollouts_of_rl_have_their_rows(capsys: pytest.CaptureFixture[str]) -> None:
    line = "plan model=qwen2_5_math_7b hardware=h200 gpus=8 mode=rl seq=9216 batch=1024 parallel.tp=2"
    assert main(line.split()) == 0
    printed = capsys.readouterr().out
    for words in ("rollout_decode", "weight_sync", "KV cache"):
        assert words in printed


def test_hardware_of_the_users_own_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "plan model=llama3_1_8b hardware=h100 hardware.memory_gib=60.5 hardware.gpus_per_node=4 gpus=8 --json"
    )
    assert main(line.split()) == 0
    assert json.loads(capsys.readouterr().out)["breakdown"]["available_gib"] == 60.5


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("model=lama3_1_70b hardware=h100 gpus=64", "did you mean llama3_1_70b"),
        ("model=llama3_1_70b hardware=a100 gpus=64", "unknown hardware a100"),
        ("model=llama3_1_70b hardware=h100 gpus=8", "no layout fits 8 GPUs"),
        ("model=llama3_1_70b hardware=h100", "no gpus given"),
        ("model=llama3_1_70b hardware=h100 gpus=some", "expected a whole number"),
        ("model=llama3_1_70b hardware=h100 gpus=6.5", "gpus=6.5 given, expected a whole number"),
        ("model=llama3_1_70b hardware=h100 gpus=true", "gpus=true given, expected a whole number"),
        ("model=llama3_1_70b hardware=h100 gpus=64 distributed_optimizer=5", "expected true or false"),
        ("model=llama3_1_70b hardware=h100 gpus=64 model.tied=1", "expected true or false"),
        ("model=llama3_1_70b hardware=h100 gpus=64 hardware.memory_gib=big", "expected a number"),
        (
            "model=llama3_1_70b hardware=h100 gpus=64 hardware.memory_gib=inf",
            "memory_gib=inf, expected a fin",
        ),
        (
            "model=llama3_1_70b hardware=h100 gpus=64 hardware.memory_gib=nan",
            "memory_gib=nan, expected a fin",
        ),
        (
            "model=llama3_1_70b hardware=h100 gpus=64 hardware.gpus_per_node=8.5",
            "gpus_per_node=8.5, expected a",
        ),
        (
            "model=qwen3_30b_a3b hardware=h100 gpus=64 model.dense_layers=40",
            "ffn=0 with model.dense_layers=40",
        ),
        ("model=llama3_1_70b hardware=h100 gpus=64 precision=fp32", "expected bf16 or fp8"),
        ("model=llama3_1_70b hardware=h100 gpus=64 parallel.microbatch=0", "microbatch=0, expected 1 or"),
        ("model=llama3_1_70b hardware=h100 gpus=64 recompute=some", "expected none, selective or full"),
        ("model=llama3_1_70b hardware=h100 gpus=64 paralel.tp=2", "did you mean parallel.tp"),
        ("model=llama3_1_70b hardware=h100 gpus=64 precision=fp4", "expected bf16 or fp8"),
        ("model=llama3_1_70b hardware=h100 gpus=64 parallel.tp=3", "choose a divisor"),
        ("model=llama3_1_70b hardware=h100 gpus=64 gpus", "expected KEY=VALUE"),
        ("model=llama3_1_70b hardware=h100 gpus=64 parallel.tp=8 parallel.dp=9", "is not gpus=64"),
        ("model=llama3_1_70b hardware=h100 gpus=64 hardware.watts=700", "unknown figure hardware.watts"),
    ],
)
def test_what_cannot_be_is_an_error_of_one_line(
    line: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *line.split()]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_a_model_with_whole_queries_of_latent_attention_is_planned(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = "plan model=deepseek_v3 model.q_rank=0 hardware=h100 gpus=256 parallel.pp=8 parallel.ep=32 --json"
    assert main(line.split()) == 0
    assert json.loads(capsys.readouterr().out)["step_s"] > 0


def test_a_micro_batch_and_recompute_given_alone_narrow_the_search(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = "plan model=llama3_1_8b hardware=h100 gpus=8 recompute=full parallel.microbatch=2 --json"
    assert main(line.split()) == 0
    layout = json.loads(capsys.readouterr().out)["breakdown"]["layout"]
    assert (layout["recompute"], layout["microbatch"]) == ("full", 2)


def test_a_layout_that_does_not_fit_is_shown_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=llama3_1_70b", "hardware=h100", "gpus=64", "parallel.tp=2", "--json"]) == 0
    captured = capsys.readouterr()
    assert not json.loads(captured.out)["breakdown"]["fits"]
    assert captured.err.startswith("does not fit: ")


def test_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["plan", "--help"])
    assert end.value.code == 0
    assert "example: hpt plan" in capsys.readouterr().out


def test_planning_needs_neither_megatron_nor_hydra() -> None:
    code = (
        "import sys, hpt_mega.planning, hpt_mega.planning.command\n"
        "heavy = {'torch', 'megatron', 'hydra', 'omegaconf', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
