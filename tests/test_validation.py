"""Impossible configs are refused before any process starts, with what was given and expected."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpt_mega.config import ConfigError, compose, save
from hpt_mega.objective import rows
from hpt_mega.validation import validate
from hpt_mega.validation.layout import divisors

MakeModel = Callable[..., Path]


def problems(*overrides: str) -> str:
    """What validate says of the config; "" where it is fine."""
    try:
        validate(compose(overrides))
    except ConfigError as error:
        return str(error)
    return ""


def test_the_default_config_and_every_algorithm_are_accepted(model_folder: MakeModel, tmp_path: Path) -> None:
    fixed = (f"model.path={model_folder()}", f"run_dir={tmp_path}/run")
    assert problems(*fixed) == ""
    for row in rows():
        assert problems(*fixed, f"algorithm={row.name}") == ""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("parallel.tp=2",), "parallel.tp is 2 and the model has 9 attention heads; expected one of 1, 3, 9"),
        (("parallel.tp=9",), "the model has 3 key/value heads; expected one of 1, 3"),
        (("parallel.pp=16", "parallel.vpp=2"), "16 x 2 = 32 and the model has 30 layers"),
        (("parallel.pp=1", "parallel.vpp=2"), "an interleaved pipeline needs pp above 1"),
        (("parallel.pp=2", "parallel.stage_layers=[14,15]"), "expected parallel.pp x vpp = 2 numbers"),
        (("parallel.ep=2",), "parallel.ep is 2 and the model has no experts"),
        (("parallel.recompute=some",), "parallel.recompute is 'some', expected none or selective or full"),
        (("parallel.pp=0",), "parallel.pp is 0, expected above 0"),
        (("parallel.sequence_parallel=true",), "parallel.tp is 1"),
        (("parallel.dp=3", "trainer.questions_per_step=16"), "expected 15 or 18"),
        (("trainer.questions_per_step=64", "data.train_questions=63"), "more than there are"),
        (("rollout.max_new_tokens=8001",), "the model has 8192 positions"),
        (("rollout.engine=vlm",), "rollout.engine is 'vlm', expected megatron"),
        (("precision.dtype=fp15",), "precision.dtype is 'fp15', expected bf16 or fp16 or fp32"),
        (("precision=fp8_tensorwise", "precision.dtype=fp16"), "FP8 goes with bf16 or fp32"),
        (("precision=fp16", "precision.loss_scale=0.5"), "precision.loss_scale is 0.5, expected 1 or above"),
        (("precision=fp8_delayed", "precision.fp8.recipe=delay"), "'delay', expected delayed or tensorwise"),
        (("precision=fp8_mxfp8", "precision.fp8.format=e5m2"), "'e5m2', expected e4m3 or hybrid"),
        (("precision=fp8_delayed", "precision.fp8.amax_algorithm=mean"), "expected max or most_recent"),
        (("precision=fp8_delayed", "precision.fp8.amax_history=0"), "amax_history is 0"),
        (("precision=fp8_delayed", "precision.fp8.first_layers=1"), "delayed scaling spans all layers"),
        (("precision=fp8_blockwise", "precision.fp8.last_layers=16"), "takes 0 to 15"),
        (("precision=fp8_blockwise", "precision.fp8.param_gather=true"), "distributed_optimizer=true"),
        (
            ("precision=fp8_blockwise", "precision.fp8.param_gather=true", "rollout=vllm"),
            "neither servers nor exports",
        ),
        (("precision.fp8.first_layers=1",), "settings and no recipe"),
        (("resume=yes",), "expected never or auto"),
        (("data.keep_solved=0.5", "rollout=vllm", "rollout.staleness=1"), "set staleness 0"),
        (("rollout.top_p=1.5",), "rollout.top_p is 1.5, expected at most 1"),
        (("optimizer.lr=0",), "optimizer.lr is 0.0, expected above 0"),
        (("optimizer.lr=nan",), "optimizer.lr is nan, expected above 0"),
        (("optimizer.lr=inf",), "optimizer.lr is inf, expected a finite number"),
        (("rollout.temperature=nan",), "rollout.temperature is nan, expected 0 or above"),
        (("rollout.temperature=inf",), "rollout.temperature is inf, expected a finite number"),
        (("telemetry.prometheus_port=99999",), "telemetry.prometheus_port is 99999, expected 0 to 65535"),
        (("seed=-1",), "seed is -1, expected 0 to 4294967295"),
        (("seed=4294967296",), "seed is 4294967296, expected 0 to 4294967295"),
        (("gate.threshold=1.5",), "option threshold of gate 'switch' is a pass rate, expected 1 or below"),
        (
            ("data.tasks=[{name: gcd, options: {min_valu: 2}}]",),
            "data.tasks.0.options: gcd has no option 'min_valu'; did you mean min_value?; known: min_numbers",
        ),
        (("model.path=",), "model.path is empty; set model.path to a Hugging Face folder"),
        (("optimizer.cpu_offload=1.5",), "optimizer.cpu_offload is 1.5, expected 0 to 1"),
        pytest.param(
            ("optimizer.cpu_offload=0.5",),
            "optimizer.cpu_offload is 0.5 and there is no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (("trainer.checkpoint_format=dp",), "'dp', expected dp_reshardable or fully_reshardable"),
        (("data.tasks=[]",), "data.tasks is empty"),
        (("data.tasks.0.name=chain_summ",), "'chain_summ', expected one of basic_arithmetic, chain_sum"),
        (("algorithm.stabiliser=clip",), "unknown option"),
        (("algorithm.stabilizer=klip",), "unknown stabilizer 'klip'"),
        (("gate=sigmoid", "gate.threshold=0.1"), "unknown option 'threshold' of gate 'sigmoid'"),
        (("algorithm=grpo", "gate=switch"), "set gate=rollouts"),
        (("algorithm=sft", "gate=switch"), "set gate=demonstrations"),
        (("trainer.updates_per_step=17",), "a replica has 16 questions a step"),
        (("rollout.rollouts_per_question=1",), "there is nothing to compare"),
        (("algorithm=grpo", "rollout.rollouts_per_question=0"), "set gate=demonstrations, or sample"),
        (("algorithm=dpo", "algorithm.kl_coef=0.1", "algorithm.kl_in=reward"), "kl_in=reward has no meaning"),
        (("algorithm=rft", "algorithm.kl_coef=0.1", "algorithm.kl_in=reward"), "set algorithm.kl_in=loss"),
        (("algorithm=luffy", "gate=three_zone"), "it would learn nothing there; set gate=both"),
        (("algorithm=luffy", "algorithm.advantage=gae"), "has the advantages gae and joint_group_norm"),
        (("data.train_file=absent.jsonl",), "data.train_file=absent.jsonl: no such file"),
        (("algorithm=dpo", "rollout.rollouts_per_question=1"), "there is nothing to compare"),
    ],
)
def test_a_misuse_is_named_with_what_was_expected(
    overrides: tuple[str, ...], expected: str, model_folder: MakeModel, tmp_path: Path
) -> None:
    assert expected in problems(f"model.path={model_folder()}", f"run_dir={tmp_path}/run", *overrides)


def test_an_impossible_size_is_the_only_problem(model_folder: MakeModel, tmp_path: Path) -> None:
    said = problems(
        f"model.path={model_folder()}", f"run_dir={tmp_path}/run", "parallel.tp=0", "rollout=vllm"
    )
    assert [line for line in said.splitlines() if "parallel." in line] == [
        "  1. parallel.tp is 0, expected above 0"
    ]


def test_weights_that_are_cut_off_are_refused_before_any_process_starts(
    model_folder: MakeModel, tmp_path: Path
) -> None:
    folder = model_folder()
    header = b'{"a":{"dtype":"BF16","shape":[9],"data_offsets":[0,18]}}'
    weights = len(header).to_bytes(8, "little") + header + bytes(17)
    (folder / "model.safetensors").write_bytes(weights)
    said = problems(f"model.path={folder}", f"run_dir={tmp_path}/run")
    assert f"holds {len(weights)} bytes and its header describes {len(weights) + 1}; the file is cut" in said


def test_a_model_that_is_not_there_is_not_the_demo_s(tmp_path: Path) -> None:
    said = problems("model=llama3_1_70b", f"run_dir={tmp_path}/run")
    assert "no such folder" in said and "prepare_demo_model" not in said


def test_widths_that_an_fp8_recipe_cannot_take_are_named(model_folder: MakeModel, tmp_path: Path) -> None:
    folder = model_folder(hidden_size=592, intermediate_size=1536, num_key_value_heads=9, head_dim=32)
    given = (f"model.path={folder}", f"run_dir={tmp_path}/run", "parallel.pp=2")
    assert problems(*given, "precision=fp8_tensorwise") == ""
    assert "multiples of 32 and the model's hidden_size is 592" in problems(*given, "precision=fp8_mxfp8")
    assert "intermediate_size / tp is 170.667" in problems(*given, "precision=fp8_delayed", "parallel.tp=9")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({"num_attention_heads": "nine"}, "num_attention_heads is 'nine'; expected a whole number"),
        ({"num_hidden_layers": -2}, "num_hidden_layers is -2; expected a whole number"),
        ({"num_attention_heads": 0}, "cannot be built: config.json: ZeroDivisionError"),
        ({"rope_parameters": [1]}, "cannot be built: config.json: TypeError"),
        ({"architectures": ["GPT2LMHeadModel"]}, "cannot be built: architectures is ['GPT2LMHeadModel']"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_before_anything_starts(
    shape: dict[str, object], expected: str, model_folder: MakeModel, tmp_path: Path
) -> None:
    assert expected in problems(f"model.path={model_folder(**shape)}", f"run_dir={tmp_path}/run")


def test_an_index_without_a_map_of_the_weights_is_named(model_folder: MakeModel, tmp_path: Path) -> None:
    folder = model_folder()
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "index.json has no 'weight_map'; copy" in problems(
        f"model.path={folder}", f"run_dir={tmp_path}/run"
    )


def test_a_finished_run_is_not_taken_for_one_of_other_settings(
    model_folder: MakeModel, tmp_path: Path
) -> None:
    given = (f"model.path={model_folder()}", f"run_dir={tmp_path}", "resume=auto")
    save(compose([*given, "optimizer.lr=1e-4"]), tmp_path / "config.yaml")
    (tmp_path / "summary.json").write_text("{}")
    assert problems(*given, "optimizer.lr=1e-4") == ""
    assert "optimizer.lr was 0.0001, is 2e-05); choose another run_dir" in problems(*given)
    assert problems(*given, "trainer.steps=1000") == ""  # it goes on


def test_resuming_delayed_scaling_on_a_gpu_asks_for_trust_in_the_checkpoint(
    model_folder: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    folder = model_folder(hidden_size=576)
    given = (f"model.path={folder}", f"run_dir={tmp_path}/run", "parallel.pp=1", "resume=auto")
    assert problems(*given, "precision=fp8_blockwise") == ""
    assert "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1" in problems(*given, "precision=fp8_delayed")
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")
    assert problems(*given, "precision=fp8_delayed") == ""


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("parallel.ep=3", "parallel.dp=3"), "parallel.ep is 3 and the model has 8 experts"),
        (("parallel.ep=4", "parallel.dp=2"), "parallel.ep x etp is 4 x 1 = 4 and its ranks"),
        (("parallel.etp=5", "parallel.dp=5"), "parallel.etp is 5 and an expert has 1536 rows"),
        (("parallel.tp=3",), "together with parallel.sequence_parallel=true"),
        (
            ("parallel.ep=2", "parallel.dp=2", "parallel.vpp=3"),
            "would meet in different layers; set vpp to 1",
        ),
        (
            ("parallel.ep=2", "parallel.dp=2", "rollout=vllm"),
            "parallel.ep x etp is 2 and a replica has 1 ranks a stage (tp x cp)",
        ),
    ],
)
def test_a_layout_that_does_not_fit_the_experts_is_named(
    overrides: tuple[str, ...], expected: str, model_folder: MakeModel, tmp_path: Path
) -> None:
    folder = model_folder(num_experts=8)
    fixed = (f"model.path={folder}", f"run_dir={tmp_path}/run", "trainer.questions_per_step=12")
    assert expected in problems(*fixed, *overrides)
    assert problems(*fixed, "parallel.ep=2", "parallel.dp=2") == ""


def test_sglang_is_refused_where_there_is_no_gpu_and_servers_where_there_are_too_few(
    model_folder: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = (f"model.path={model_folder()}", f"run_dir={tmp_path}/run", "rollout=sglang", "parallel.pp=2")
    said = problems(*fixed)
    assert said.startswith("1 problem") and "kernels need a GPU, and torch sees none here" in said
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sglang" else object())
    assert "sglang, which is not installed" in problems(*fixed)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert problems(*fixed, "rollout.server.engines=2") == ""
    assert "engines x tp is 3 x 1 = 3 and a replica has 2 GPUs" in problems(
        *fixed, "rollout.server.engines=3"
    )
    assert "engines is 0, expected above 0" in problems(*fixed, "rollout.server.engines=0")


@pytest.mark.parametrize(
    ("urls", "more", "expected"),
    [
        ("http://node7:30000", ("rollout=megatron",), "rollout.engine is megatron, which asks none"),
        ("node7:30000", (), "holds 'node7:30000', expected http://HOST:PORT"),
        ("http://node7", (), "holds 'http://node7', expected http://HOST:PORT"),
        ("http://a:1,http://a:1", (), "names 1 servers in 2 entries and parallel.dp is 1"),
        ("http://a:1", ("parallel.dp=2",), "names 1 servers in 1 entries and parallel.dp is 2"),
        ("http://a:1,http://b:1", ("parallel.dp=2",), ""),
    ],
)
def test_servers_at_urls_need_a_key_an_address_and_to_be_enough(
    urls: str,
    more: tuple[str, ...],
    expected: str,
    model_folder: MakeModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HPT_ROLLOUT_KEY", "secret")
    own = () if more and "rollout" in more[0] else ("rollout=sglang",)  # which needs no GPU here then
    fixed = (f"model.path={model_folder()}", f"run_dir={tmp_path}/run", f"rollout.server.urls=[{urls}]")
    said = problems(*fixed, *own, *more)
    assert expected in said if expected else said == ""
    monkeypatch.delenv("HPT_ROLLOUT_KEY")
    assert "the environment variable HPT_ROLLOUT_KEY is not set" in problems(*fixed, *own, *more)


def test_on_gpus_the_trainers_own_processes_do_not_decode_through_a_pipeline(
    model_folder: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (f"model.path={model_folder()}", f"run_dir={tmp_path}/run")
    assert problems(*given, "parallel.pp=2") == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "set rollout=vllm, or pp to 1" in problems(*given, "parallel.pp=2")
    assert problems(*given, "parallel.pp=1") == ""


def test_on_gpus_a_context_is_not_shared_in_fp32(
    model_folder: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = (f"model.path={model_folder()}", f"run_dir={tmp_path}/run", "parallel.pp=1", "parallel.cp=2")
    assert problems(*given, "precision=fp32") == ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "in bf16 and fp16 only" in problems(*given, "precision=fp32")
    assert problems(*given, "precision=bf16") == problems(*given[:3], "precision=fp32") == ""


def test_servers_sleep_on_a_gpu_and_only_where_they_do_not_work_during_training(
    model_folder: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = (f"model.path={model_folder()}", f"run_dir={tmp_path}/run", "rollout=vllm", "parallel.pp=2")
    asleep = (*fixed, "rollout.server.sleep=true")
    assert "frees a server's GPU memory during training, and torch sees no GPU" in problems(*asleep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert problems(*asleep) == ""
    assert "sleep is true and rollout.staleness 1" in problems(*asleep, "rollout.staleness=1")
    monkeypatch.setenv("HPT_ROLLOUT_KEY", "secret")
    assert "whose GPUs are not the trainer's" in problems(*asleep, "rollout.server.urls=[http://a:1]")


def test_all_problems_are_listed_at_once(model_folder: MakeModel, tmp_path: Path) -> None:
    said = problems(
        f"model.path={model_folder()}", f"run_dir={tmp_path}/run", "parallel.pp=31", "trainer.steps=0"
    )
    assert said.startswith("2 problems")
    assert "1. trainer.steps" in said
    assert "2. parallel.pp" in said


def test_a_missing_model_tells_how_to_make_the_demo_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = problems()
    assert "no such folder" in said
    assert "tools/prepare_demo_model.py --out models/smollm2-135m-instruct" in said


def test_a_model_folder_without_weights_is_refused(model_folder: MakeModel) -> None:
    folder = model_folder()
    (folder / "model.safetensors").unlink()
    assert "holds no *.safetensors" in problems(f"model.path={folder}")
    (folder / "config.json").unlink()
    assert "holds no config.json" in problems(f"model.path={folder}")


def test_the_number_of_started_processes_must_be_that_of_the_layout(
    model_folder: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = (f"model.path={model_folder()}", f"run_dir={tmp_path}/run", "parallel.pp=2", "parallel.dp=1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "WORLD_SIZE is 3 and parallel.tp x cp x pp x dp = 1 x 1 x 2 x 1 = 2" in problems(*fixed)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert problems(*fixed) == ""
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "4")
    assert "srun torchrun" in problems(*fixed)


def test_an_unfinished_run_is_neither_overwritten_nor_mixed(model_folder: MakeModel, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    fixed = (f"model.path={model_folder()}", f"run_dir={run}")
    assert "resume=auto" in problems(*fixed)
    assert problems(*fixed, "resume=auto") == ""
    (run / "summary.json").touch()
    assert problems(*fixed) == ""


def test_a_finished_run_is_not_renamed_while_the_next_reads_from_it(
    model_folder: MakeModel, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("algorithm: {}\ngate: {}\nrun_dir: x\n")
    (run / "summary.json").write_text("{}")
    model_folder().rename(run / "hf")
    assert problems(f"model.path={run}/hf", f"run_dir={tmp_path}/next") == ""
    said = problems(f"model.path={run}/hf", f"run_dir={run}")
    assert f"model.path={run}/hf lies in run_dir={run}" in said and "1 problem" in said


def test_a_folder_of_somebodys_own_files_is_no_run_folder(
    model_folder: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = f"model.path={model_folder()}"
    for mine in ("proj/config.yaml", "proj/logs/mine.log", "notes/a.txt"):
        (tmp_path / mine).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / mine).write_text("trainer: {name: mine}\n")
    for resume in ("never", "auto"):
        assert "holds a config.yaml that `hpt train` has not written" in problems(
            model, "run_dir=proj", f"resume={resume}"
        )
    assert "run_dir=notes holds a.txt, and no run of `hpt train`" in problems(model, "run_dir=notes")
    assert "run_dir is empty; name a folder" in problems(model, "run_dir=")
    assert (tmp_path / "proj" / "logs" / "mine.log").is_file()


def test_a_folder_that_a_job_or_a_lab_has_prepared_is_a_run_folder(
    model_folder: MakeModel, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for path in ("logs/srun.log", "logs/serve0.log", "preflight/node0.json", "slurm-hpt-7.out", "label.json"):
        (run / path).parent.mkdir(parents=True, exist_ok=True)
        (run / path).touch()
    fixed = (f"model.path={model_folder()}", f"run_dir={run}")
    assert problems(*fixed) == problems(*fixed, "resume=auto") == ""
    save(compose(fixed), run / "config.yaml")  # of an attempt that failed at its start
    (run / "notes.txt").touch()
    assert problems(*fixed) == ""


@given(number=st.integers(1, 200), limit=st.integers(1, 200))
def test_the_offered_numbers_are_the_divisors_up_to_the_limit(number: int, limit: int) -> None:
    offered = [int(text) for text in divisors(number, limit).split(", ")]
    assert all(number % divisor == 0 and divisor <= limit for divisor in offered)
    assert len(offered) == sum(number % k == 0 for k in range(1, min(number, limit) + 1))


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "vocab_size": 1000,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "num_hidden_layers": 3,
}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("frozen=[decoder.layers.3]", "'decoder.layers.3' means no parameter; there are embedding.word_"),
        ("frozen=['*']", "leaves nothing to train"),
        ("frozen=[embedding]", ""),
        ("groups=[{match:experts}]", "groups.0.match='experts' means no parameter that is trained"),
        ("groups=[{match:'*.mlp'},{match:decoder}]", "groups.1 and optimizer.groups.0 both mean decoder."),
        ("groups=[{match:decoder,lr_scale:0}]", "lr_scale is 0.0, expected above 0"),
        ("groups=[{match:decoder,weight_decay:-1}]", "weight_decay is -1.0, expected 0 or above"),
        ("groups=[{match:'*.mlp',lr_scale:2},{match:'*norm*',weight_decay:0.1}]", ""),
    ],
)
def test_patterns_of_parameters_must_mean_some_and_not_two_things(
    override: str, expected: str, model_folder: MakeModel, tmp_path: Path
) -> None:
    fixed = (f"model.path={model_folder(**LLAMA)}", f"run_dir={tmp_path}/run", "parallel.pp=1")
    found = problems(*fixed, f"optimizer.{override}")
    assert expected in found
    assert bool(found) == bool(expected)
    frozen = problems(*fixed, "optimizer.frozen=[decoder]", "optimizer.groups=[{match:'*.mlp'}]")
    assert "means no parameter that is trained" in frozen
