"""`hpt eval` on a tiny random model: the authors' file format, a kill, a resumption, two replicas."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpt_mega.cli import CONFIG_ERROR, main
from hpt_mega.config import Config, ConfigError, save
from hpt_mega.evaluation.benchmarks import load_benchmarks
from hpt_mega.evaluation.config import RESPONSES, EvalConfig
from hpt_mega.evaluation.worker import longest_response
from tests.data.byte_tokenizer import byte_tokenizer
from tests.megatron.tiny import save_llama

pytestmark = pytest.mark.timeout(650)
QUESTIONS, K = 7, 3
DEADLINE_S = 200.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_llama(tmp_path_factory.mktemp("model"), tied=False, vocabulary=261)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def benchmark(tmp_path: Path) -> Path:
    """A file as the authors have them: a list of prompt and answer, in a folder named like the benchmark."""
    path = tmp_path / "AIME24" / "test.json"
    path.parent.mkdir()
    rows = [{"prompt": f"What is {i}?", "answer": rf"\boxed{{{i}}}"} for i in range(QUESTIONS)]
    path.write_text(json.dumps(rows))
    return path


def start(model: Path, benchmark: Path, run_dir: Path, *settings: str) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "-m", "hpt_mega.cli", "eval", f"model={model}", f"benchmarks=[{benchmark}]"),
        *(f"k={K}", "max_new_tokens=24", "questions_per_batch=2", "precision.dtype=fp32"),
        *(f"training_data=[{benchmark}]", f"run_dir={run_dir}", *settings),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    return output


def responses(run_dir: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "responses.jsonl").read_text().splitlines()]
    keyed = {(row["mode"], row["question"], row["sample"]): row for row in rows}
    assert len(keyed) == len(rows), "a response is kept twice"
    return keyed


def test_a_killed_evaluation_goes_on_and_ends_as_one_of_two_replicas_never_killed(
    model: Path, benchmark: Path, tmp_path: Path
) -> None:
    whole = start(model, benchmark, tmp_path / "whole", "parallel.dp=2")
    finish(whole)
    killed = tmp_path / "killed"
    process = start(model, benchmark, killed)
    journal = killed / "responses.jsonl"
    end = time.monotonic() + DEADLINE_S
    whole_batch = 2 * K  # lines, at most; the line after it is torn below
    while not journal.is_file() or journal.read_bytes().count(b"\n") <= whole_batch:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.01)
    process.kill()
    process.communicate()
    kept = journal.read_bytes()
    journal.write_bytes(kept[: len(kept) - 30])  # as if the kill had torn the last line
    printed = finish(start(model, benchmark, killed))
    assert "of 8 batches" not in printed  # the rest only
    assert responses(killed) == responses(tmp_path / "whole")
    check_outputs(killed)
    asked = json.loads((killed / "asked.json").read_text())
    (killed / "asked.json").write_text(json.dumps(asked | {"weights": []}))
    again = start(model, benchmark, killed)
    printed = again.communicate(timeout=DEADLINE_S)[0]
    assert again.returncode != 0 and "responses from before the weights changed" in printed


def check_outputs(run_dir: Path) -> None:
    results = json.loads((run_dir / "results.json").read_text())
    found = results["benchmarks"]["AIME24"]
    assert (found["questions"], found["kind"], found["prompt"]) == (QUESTIONS, "math", "<u>What is 0?<e><a>")
    assert set(found["sampled"]["pass@k"]) == {"1", "2", "3"} and f"avg@{K}" in found["sampled"]
    assert len(results["contamination"]["AIME24"]["overlapping"]) == QUESTIONS
    assert results["seed"] == 1234 and results["temperature"] == 0.6 and "torch" in results["versions"]
    rows = responses(run_dir).values()
    assert len(rows) == QUESTIONS * (1 + K)
    assert all({"response", "extracted", "reward", "why"} <= row.keys() for row in rows)
    table = (run_dir / "results.md").read_text()
    assert "| HPT (published) | 33.0 |" in table and "this run, sampled" in table
    assert "HPT (published) & 33.0" in (run_dir / "results.tex").read_text()
    assert "<table" in (run_dir / "results.html").read_text()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["benchmarks=[aime]"], "'aime' is none of conf/benchmark (aime24, aime25"),
        (["benchmarks=[a.json]"], "a.json: no such file"),
        (["benchmarks=[aime24]", "max_new_tokens=512"], "the model has 512 positions"),
        (["benchmarks=[aime24]", "template=qwen"], "template is 'qwen', expected one of chat, qwen_math"),
        (["benchmarks=[aime24]", "engine=trt"], "engine is 'trt', expected one of megatron"),
        (
            ["benchmarks=[aime24]", "precision.dtype=fp64"],
            "precision.dtype is 'fp64', expected one of bf16, fp16",
        ),
        (["benchmarks=[aime24]", "precision.fp8.recipe=delayed"], "unknown key precision.fp8.recipe"),
        (["benchmarks=[aime24]", "server.tp=4"], "unknown key server.tp; did you mean parallel.tp"),
        (["benchmarks=[aime24]", "reward.kind=exact"], "unknown key reward.kind; did you mean kind"),
        (["benchmarks=[aime24]", "parallel.recompute=full"], "unknown key parallel.recompute"),
        (["benchmarks=[aime24]", "parallel.pp=0"], "parallel.pp is 0, expected 1 or above"),
        (["benchmarks=[aime24]", "parallel.tp=5"], "parallel.tp is 5 and the model has 12 attention heads"),
        (["benchmarks=[aime24]", "parallel.pp=9"], "9 x 1 = 9 and the model has"),
        (["benchmarks=[aime24]", "parallel.ep=2"], "parallel.ep is 2 and the model has no experts; set 1"),
        (
            ["benchmarks=[aime24]", "engine=vllm", "parallel.pp=2", "parallel.dp=2"],
            "set only parallel.dp above 1",
        ),
        (["benchmarks=[aime24]", "reward.workers=0"], "reward.workers is 0, expected 1 or above"),
        (["benchmarks=[aime24]", "temperature=nan"], "temperature is nan, expected 0 or above"),
        (["benchmarks=[aime24]", "temperature=inf"], "temperature is inf, expected a finite number"),
        (["benchmarks=[aime24]", "deadline_s=-1"], "deadline_s is -1.0, expected above 0"),
        (["benchmarks=[aime24]", "level=95"], "level is 95.0, expected above 0 and below 1"),
        (["benchmarks=[aime24]", "max_new_tokens=0"], "max_new_tokens is 0, expected 1 or above, or null"),
        (["benchmarks=[aime24]", "training_data=[no.jsonl]"], "training_data=no.jsonl: no such file"),
        (["benchmarks=[aime24]", "training_data=[no.txt]"], "training_data: 'no.txt': expected files .jsonl"),
        (["benchmarks=[aime24]", "run_dir="], "run_dir is empty; expected a folder"),
        (["benchmarks=[aime24]", "k=-1"], "k is -1, expected 0 or above"),
        (["benchmarks=[aime24]", "top_p=0"], "top_p is 0.0, expected above 0"),
        (["benchmarks=[aime24]", "max_tokens=4"], "unknown key max_tokens; did you mean max_new_tokens"),
        (["k=4"], "no benchmarks given; expected benchmarks=[aime24,math500]"),
        (
            ["benchmarks=[aime24]", "k=many"],
            "k: Value 'many' of type 'str' could not be converted to Integer; exp",
        ),
        (["benchmarks=[aime24"], "cannot read 'benchmarks=[aime24': while parsing"),
    ],
)
def test_an_impossible_evaluation_is_refused_before_it_starts(
    settings: list[str],
    expected: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    assert main(["eval", f"model={model}", f"run_dir={run_dir}", *settings]) == CONFIG_ERROR
    assert expected in capsys.readouterr().err
    assert not run_dir.exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "holds no config.json; expected a Hugging Face model folder"),
        ("{", "config.json is no JSON"),
        ("[]", "config.json holds a list; expected a JSON object"),
        ("{}", "cannot be built: architectures is [] in the model's config.json; known: LlamaForCausalLM"),
        ('{"num_attention_heads": "nine"}', "num_attention_heads is 'nine'; expected a whole number"),
        ('{"architectures": ["GPT2LMHeadModel"]}', "architectures is ['GPT2LMHeadModel'] in the model's"),
        ('{"architectures": "LlamaForCausalLM"}', "cannot be built: architectures is LlamaForCausalLM"),
    ],
)
def test_a_model_whose_config_cannot_be_used_is_refused_before_it_starts(
    text: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    settings = [f"model={tmp_path}", f"run_dir={tmp_path / 'run'}", "benchmarks=[aime24]", "engine=vllm"]
    assert main(["eval", *settings]) == CONFIG_ERROR
    assert expected in capsys.readouterr().err


def test_weights_that_are_cut_off_are_refused_before_anything_starts(
    model: Path, benchmark: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = shutil.copytree(model, tmp_path / "cut")
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    settings = [f"benchmarks=[{benchmark}]", f"run_dir={tmp_path / 'run'}"]
    assert main(["eval", f"model={cut}", *settings]) == CONFIG_ERROR
    assert "the file is cut off: copy it again" in capsys.readouterr().err


def test_a_folder_is_taken_by_an_evaluation_once_it_holds_responses_and_never_from_something_else(
    model: Path,
    benchmark: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def begin(config: EvalConfig, path: Path, *_: object) -> int:
        save(config, path)
        return 1

    monkeypatch.setattr("hpt_mega.launch.run", begin)
    run_dir = tmp_path / "run"
    settings = ["eval", f"model={model}", f"benchmarks=[{benchmark}]", f"run_dir={run_dir}"]
    assert main([*settings, "k=2"]) == 1
    assert main([*settings, "k=3"]) == 1  # the first attempt answered nothing
    (run_dir / RESPONSES).write_text("{}\n")
    assert main([*settings, "k=4"]) == CONFIG_ERROR
    assert "holds responses of another evaluation (k was 3, is 4)" in capsys.readouterr().err
    assert main([*settings, "k=3"]) == 1
    save(Config(), run_dir / "config.yaml")
    assert main([*settings, "k=3"]) == CONFIG_ERROR
    assert "holds a run of hpt train; choose another folder" in capsys.readouterr().err
    (run_dir / "config.yaml").unlink()
    assert main([*settings, "k=3"]) == CONFIG_ERROR
    assert "holds files of no evaluation" in capsys.readouterr().err


def test_without_a_number_a_response_has_what_the_longest_prompt_leaves_of_the_positions(
    model: Path, benchmark: Path
) -> None:
    cfg = EvalConfig(model=str(model), benchmarks=[str(benchmark)])
    benchmarks = load_benchmarks(cfg, byte_tokenizer())
    longest = max(len(question.prompt_tokens) for question in benchmarks[0].questions)
    assert longest_response(cfg, benchmarks) == 512 - longest
    assert longest_response(replace(cfg, max_new_tokens=24), benchmarks) == 24
    with pytest.raises(ConfigError, match=f"set max_new_tokens, which is 500, to {512 - longest}, or leave"):
        longest_response(replace(cfg, max_new_tokens=500), benchmarks)
    question = replace(benchmarks[0].questions[0], prompt_tokens=(1,) * 512)
    with pytest.raises(ConfigError, match="is a prompt of 512 tokens and the model has 512 positions"):
        longest_response(cfg, [replace(benchmarks[0], questions=[question])])
