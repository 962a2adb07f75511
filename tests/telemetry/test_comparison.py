"""The comparison of runs: what is read from their folders, and what stands in its tables."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from hpt_mega.cli import main
from hpt_mega.config import ConfigError, compose, save
from hpt_mega.telemetry.comparison import write_comparison
from hpt_mega.telemetry.records import DamagedFileError, append
from hpt_mega.telemetry.runs import COUNTS, LABEL, find, unfinished, unnamed
from hpt_mega.telemetry.summary import summarise

STEPS = 20


def make(folder: Path, *overrides: str, seed: int = 1, final: float = 0.5, sft: float = 0.5) -> Path:
    """A finished run of STEPS steps whose accuracy rises to `final` and whose SFT share falls to `sft`."""
    cfg = compose([*overrides, f"seed={seed}", f"trainer.steps={STEPS}", f"run_dir={folder}"])
    save(cfg, folder / "config.yaml")
    records = [
        {
            "step": step,
            "sft_fraction": 1 - (1 - sft) * step / STEPS,
            "entropy": 0.4,
            "response_length": 9.0,
            "tokens_rollout": 10.0,
            "tokens_trained": 5.0,
            "policy_version": step,
            "timing": {"step": 1.0},
        }
        for step in range(1, STEPS + 1)
    ]
    evaluated = {"eval/accuracy": 0.1, "eval/standard_error": 0.01}
    records[-1] |= evaluated | {"eval/accuracy": final}
    append(folder / "metrics.jsonl", {"step": 0, **evaluated}, *records)
    summarise([{"step": 0, **evaluated}, *records], cfg).save(folder / "summary.json")
    return folder


def label(folder: Path, method: str, cell: str, seed: int, correct: Mapping[str, int]) -> None:
    """Make it a run of a lab, with four samples to each of four questions; the base solved only "a"."""
    (folder / "eval").mkdir()
    kinds = {"a": "sum 2", "b": "sum 2", "c": "sum 3", "d": "sum 9"}
    greedy = {question: float(count > 2) for question, count in correct.items()}
    counts = {"samples": 4, "task": kinds, "correct": dict(correct), "greedy": greedy}
    (folder / "eval" / COUNTS).write_text(json.dumps(counts))
    base = folder.parent / "base.json"
    base.write_text(json.dumps(counts | {"correct": {"a": 2, "b": 0, "c": 0, "d": 0}}))
    names = {"method": method, "cell": cell, "seed": seed, "base": "../base.json", "outside": ["sum 9"]}
    (folder / LABEL).write_text(json.dumps(names))


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    for cell in ("small", "large"):
        for seed, extra in ((1, 0), (2, 1)):
            for method, solved in (("hpt", 4), ("grpo", 0), ("other", 2)):
                folder = make(
                    tmp_path / cell / f"{method}{seed}",
                    f"algorithm={method.replace('other', 'sft')}",
                    seed=seed + 10 * (cell == "large"),
                )
                label(folder, method, cell, seed, {"a": 3 + extra, "b": solved, "c": solved, "d": 0})
    return tmp_path


def rows(markdown: str, title: str) -> dict[str, list[str]]:
    table = markdown.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {line[0]: line[1:] for line in lines}


def test_the_tables_hold_means_paired_differences_and_never_solved_questions(lab: Path) -> None:
    write_comparison([lab], lab)
    markdown = (lab / "comparison.md").read_text()
    overall = rows(markdown, "Held-out accuracy after training")
    assert list(overall) == ["method", "hpt", "grpo", "other"]
    # hpt: (3, 4, 4, 0) and (4, 4, 4, 0) of 16 on both models; half of 95 %: 4.303 * 0.0442 / 2 = 9.5 %
    assert overall["hpt"][:2] == ["71.9 ± 9.5", "95.8 ± 12.7"]
    assert [overall[method][3] for method in ("hpt", "grpo", "other")] == [
        "66.7 ± 0.0", "0.0 ± 0.0", "33.3 ± 0.0",
    ]  # fmt: skip
    assert overall["grpo"][-3:] == ["+50.0 ± 0.0", "< 0.001", "< 0.001"]
    by_model = rows(markdown, "By model")
    assert by_model["method"] == ["large", "hpt − method", "small", "hpt − method"]
    assert by_model["other"] == ["46.9 ± 39.7", "+25.0 ± 0.0"] * 2
    assert "small 12.5 % (3 of 4 never solved in 4 samples)" in markdown
    assert rows(markdown, "pass@k")["other"] == ["46.9 ± 9.5", "66.7 ± 0.0", "75.0 ± 0.0"]
    assert rows(markdown, "By kind of question")["sum 9 (other kind)"] == ["0.0", "0.0", "0.0"]
    assert rows(markdown, "Course of training")["hpt"][0] == "96.2 → 51.2"


def test_the_labels_say_what_the_others_are_tested_against(lab: Path) -> None:
    for file in lab.glob("*/other*/label.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"is_reference": True}))
    write_comparison([lab], lab)
    overall = rows((lab / "comparison.md").read_text(), "Held-out accuracy after training")
    assert list(overall) == ["method", "other", "hpt", "grpo"]
    assert overall["method"][-3:] == ["other − method", "p", "p of all"]


def test_means_are_taken_over_models_and_seeds_that_every_method_has(lab: Path) -> None:
    folder = make(lab / "large" / "hpt3", "algorithm=hpt")
    label(folder, "hpt", "large", 3, {"a": 0, "b": 0, "c": 0, "d": 0})
    write_comparison([lab], lab)
    markdown = (lab / "comparison.md").read_text()
    assert "left out: 1 run without a partner in every method" in markdown
    assert rows(markdown, "Held-out accuracy after training")["hpt"][0] == "71.9 ± 9.5"


def test_a_run_that_was_made_again_is_no_further_seed(lab: Path) -> None:
    write_comparison([lab], lab)
    before = rows((lab / "comparison.md").read_text(), "Held-out accuracy after training")
    old = lab / "small" / "grpo1.1"
    shutil.copytree(lab / "small" / "grpo1", old)
    os.utime(old / "summary.json", (0, 0))
    write_comparison([lab], lab)
    markdown = (lab / "comparison.md").read_text()
    assert "left out: 1 run made again" in markdown
    assert rows(markdown, "Held-out accuracy after training") == before


def test_a_lab_s_run_without_its_evaluation_is_unfinished(lab: Path) -> None:
    (lab / "small" / "grpo2" / "eval" / COUNTS).unlink()
    write_comparison([lab], lab)
    markdown = (lab / "comparison.md").read_text()
    assert "left out: 1 run unfinished · left out: 2 runs without a partner in every method" in markdown
    assert "# 3 methods, 9 runs" in markdown and "## pass@k" in markdown


def test_evaluations_count_where_every_run_has_one(lab: Path) -> None:
    for run in lab.glob("*/*/label.json"):
        run.unlink()
    write_comparison([lab], lab)
    assert "pass@k" in (lab / "comparison.md").read_text()
    (lab / "small" / "grpo2" / "eval" / COUNTS).unlink()
    write_comparison([lab], lab)
    markdown = (lab / "comparison.md").read_text()
    assert "left out: the evaluations of 11, which others lack" in markdown
    assert "pass@k" not in markdown


def test_the_page_is_one_file_with_every_figure_in_it(lab: Path) -> None:
    page = write_comparison([lab], lab / "report").read_text()
    assert page.count("<svg") == len(list((lab / "report" / "plots").glob("*.png"))) == 5
    assert not re.search(r"(?:src|href)=[\"'](?!#)", page)
    assert "pass@k after training" in page


def test_stages_are_one_run_whose_steps_are_counted_through(tmp_path: Path) -> None:
    home = make(tmp_path / "both", "algorithm=grpo", final=0.6)
    make(home / "stage0", "algorithm=sft", final=0.3)
    label(home, "both", "small", 1, {"a": 1, "b": 1, "c": 1, "d": 1})
    (tmp_path / "begun").mkdir()
    append(tmp_path / "begun" / "metrics.jsonl", {"step": 0})
    assert unfinished([tmp_path]) == 1
    (run,) = find([tmp_path])
    assert [record["step"] for record in run.records] == list(range(2 * STEPS + 1))
    evaluated = [record for record in run.records if "eval/accuracy" in record]
    assert [(r["step"], r["eval/accuracy"]) for r in evaluated] == [(0, 0.1), (STEPS, 0.3), (2 * STEPS, 0.6)]


def test_unlabelled_runs_are_named_by_what_tells_them_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, overrides in {"a": ["algorithm=hpt"], "b": ["algorithm=hpt", "optimizer.lr=3e-3"]}.items():
        for seed in (1, 2):
            make(tmp_path / name / str(seed), *overrides, seed=seed, final=0.25 * seed)
    assert main(["report", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "comparison.html")
    overall = rows((tmp_path / "comparison.md").read_text(), "Held-out accuracy after training")
    assert set(overall) == {"method", "optimizer.lr=2e-05", "optimizer.lr=0.003"}
    assert overall["optimizer.lr=0.003"][0].startswith("37.5 ± ")


def test_an_algorithm_s_name_will_do_where_it_tells_runs_apart_and_what_else_differs_is_said(
    tmp_path: Path,
) -> None:
    for name, more in {"hpt": [], "grpo": ["optimizer.lr=3e-3"], "sft": []}.items():
        make(tmp_path / name, f"algorithm={name}", *more)
    found = find([tmp_path])
    assert {run.method for run in found} == {"hpt", "grpo", "sft"}
    assert unnamed(found) == ["optimizer.lr"]
    assert (
        "· optimizer.lr differs too" in write_comparison([tmp_path], tmp_path).with_suffix(".md").read_text()
    )
    make(tmp_path / "soft", "algorithm=hpt", "gate=soft")
    found = find([tmp_path])
    names = {run.folder.name: run.method for run in found}
    assert names["hpt"] == "hpt optimizer.lr=2e-05 gate.name=switch gate.options.threshold=0.0"
    assert names["soft"].startswith("hpt optimizer.lr=2e-05 gate.name=soft ")
    assert unnamed(found) == []


def test_two_labs_without_a_shared_task_are_compared_each_by_its_own(lab: Path) -> None:
    for folder in lab.glob("large/grpo*"):
        counts = json.loads((folder / "eval" / COUNTS).read_text())
        counts["task"] = dict.fromkeys(counts["task"], "product")
        (folder / "eval" / COUNTS).write_text(json.dumps(counts))
    for folder in [*lab.glob("small/grpo*"), *lab.glob("large/hpt*"), *lab.glob("*/other*")]:
        shutil.rmtree(folder)
    write_comparison([lab], lab)
    markdown = (lab / "comparison.md").read_text()
    assert rows(markdown, "By kind of question") == {
        "kind": ["hpt", "grpo"], "product": ["–", "21.9"],
        "sum 2": ["93.8", "–"], "sum 3": ["100.0", "–"], "sum 9 (other kind)": ["0.0", "–"],
    }  # fmt: skip
    assert rows(markdown, "Held-out accuracy after training")["grpo"][-3:] == ["–", "–", "–"]


def test_a_run_without_an_accuracy_leaves_a_dash_and_no_pair(tmp_path: Path) -> None:
    for method in ("hpt", "grpo"):
        for seed in (1, 2):
            make(tmp_path / method / str(seed), f"algorithm={method}", seed=seed, final=0.25 * seed)
    path = tmp_path / "grpo" / "2" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"final_accuracy": None}))
    write_comparison([tmp_path], tmp_path)
    markdown = (tmp_path / "comparison.md").read_text()
    assert "· without a held-out accuracy: 1\n" in markdown
    by_model = rows(markdown, "By model")
    assert by_model["hpt"][0].startswith("37.5 ± ") and by_model["grpo"] == ["–", "+0.0"]
    for path in tmp_path.glob("*/*/summary.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"final_accuracy": None}))
    write_comparison([tmp_path], tmp_path)
    assert rows((tmp_path / "comparison.md").read_text(), "By model")["hpt"][0] == "–"


def test_runs_of_unlike_length_are_not_said_to_be_of_one(tmp_path: Path) -> None:
    make(tmp_path / "hpt", "algorithm=hpt")
    short = make(tmp_path / "grpo", "algorithm=grpo") / "metrics.jsonl"
    assert f"· {STEPS} steps each" in write_comparison([tmp_path], tmp_path).read_text()
    short.write_text("".join(short.read_text().splitlines(keepends=True)[:8]))
    assert f"· 7 to {STEPS} steps" in write_comparison([tmp_path], tmp_path).read_text()


@pytest.mark.parametrize("gone", [True, False])
def test_a_finished_run_whose_metrics_are_lost_is_named(
    gone: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [str(make(tmp_path / name, f"algorithm={name}")) for name in ("hpt", "grpo")]
    metrics = tmp_path / "grpo" / "metrics.jsonl"
    metrics.unlink() if gone else metrics.write_text("")
    for given in (folders, [str(tmp_path)], *([folders[1:]] if gone else [])):
        assert main(["report", *given]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {metrics} is gone or empty; expected a line a step")
        assert error.count("\n") == 1


def test_a_summary_that_lacks_what_is_compared_is_named(tmp_path: Path) -> None:
    path = make(tmp_path / "a") / "summary.json"
    path.write_text(json.dumps({"config": {}, "seed": 1, "seconds": {}}))
    with pytest.raises(DamagedFileError, match=r"a/summary\.json holds no final_accuracy"):
        find([tmp_path])


def test_a_folder_without_finished_runs_is_named(tmp_path: Path) -> None:
    make(tmp_path / "mixed" / "a")
    (tmp_path / "empty").mkdir()
    for name, said in (("nosuch", "no such folder"), ("empty", "holds no run of `hpt train`")):
        with pytest.raises(ConfigError, match=rf"{name}:? {said}"):
            find([tmp_path / "mixed", tmp_path / name])
    (tmp_path / "mixed" / "a" / "summary.json").write_text('{"seed": ')
    with pytest.raises(DamagedFileError, match=r"a/summary\.json: .*expected one JSON object"):
        find([tmp_path / "mixed"])
    shutil.rmtree(tmp_path / "mixed")
    with pytest.raises(ConfigError, match=rf"no finished run .* in {tmp_path}"):
        write_comparison([tmp_path], tmp_path)
