"""The grid of a lab: what is equal between methods, what is kept in its folder, what is refused."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from hpt_mega.cli import main
from hpt_mega.config import Config, ConfigError, compose
from hpt_mega.evaluation.config import compose as compose_evaluation
from hpt_mega.lab.config import LabConfig, keep, read
from hpt_mega.lab.exercises import draw
from hpt_mega.lab.grid import Run, base_models, runs
from hpt_mega.lab.models import save, tokenizer

WITHOUT_HPT = ("rl", "precision", "horizon", "demonstrations")  # as it stands
COMPARES_METHODS = ("demonstrations", "horizon", "likelihood", "parts")  # ablations of more than HPT


def configs(run: Run) -> list[Config]:
    return [compose(job.settings) for job in run.jobs if job.verb == "train"]


@pytest.mark.parametrize("name", ["full", "quick"])
def test_every_method_takes_equal_steps_questions_and_rollouts(name: str, tmp_path: Path) -> None:
    cfg = read(name)
    grid = [run for run in runs(cfg, tmp_path, "m") if run.seed == cfg.seeds[0] and "llama_1m" in run.cell]
    assert {run.method for run in grid} == {"sft", "grpo", "sft_grpo", "luffy", "srft", "hpt"}
    totals = set()
    for run in grid:
        stages = configs(run)
        steps = sum(stage.trainer.steps for stage in stages)
        rollouts = sum(
            stage.trainer.steps * stage.trainer.questions_per_step * stage.rollout.rollouts_per_question
            for stage in stages
        )
        rates = {(s.optimizer.lr, s.optimizer.schedule, s.trainer.updates_per_step) for s in stages}
        totals.add((steps, rollouts, *rates))
        assert compose_evaluation(run.jobs[-1].settings).k == cfg.samples
    assert len(totals) == 1
    assert totals.pop()[0] == cfg.steps


def test_the_stages_of_a_method_follow_each_other_and_ask_different_questions(tmp_path: Path) -> None:
    (run,) = [run for run in runs(read("full"), tmp_path, "m") if run.name == "sft_grpo llama_1m seed 2"]
    first, second = configs(run)
    assert (first.algorithm.name, second.algorithm.name) == ("sft", "grpo")
    assert second.model.path == f"{first.run_dir}/hf"
    assert first.seed != second.seed
    assert Path(second.run_dir) == run.folder == Path(first.run_dir).parent


def test_the_base_is_asked_with_other_random_numbers_than_what_is_trained_from_it(tmp_path: Path) -> None:
    cfg = read("full")
    (base,) = {compose_evaluation(run.jobs[-1].settings).seed for run in base_models(cfg, tmp_path)}
    (trained,) = {compose_evaluation(run.jobs[-1].settings).seed for run in runs(cfg, tmp_path, "m")}
    assert base != trained


def test_methods_meet_the_same_questions_on_the_same_seed_and_other_ones_on_another(tmp_path: Path) -> None:
    found: dict[int, set[str]] = {}
    for run in runs(read("full"), tmp_path, "m"):
        (seed,) = [setting for setting in run.jobs[0].settings if setting.startswith("seed=")]
        found.setdefault(run.seed, set()).add(seed)
    assert all(len(seeds) == 1 for seeds in found.values())
    assert len(set.union(*found.values())) == len(found) == 5


@pytest.mark.parametrize("name", ["full", "quick"])
def test_the_sets_share_no_question_and_fit_the_limits_of_length(name: str, tmp_path: Path) -> None:
    cfg = read(name)
    data, words = cfg.data, tokenizer()
    sets = draw([data.pretraining, data.training, [*data.heldout, *data.outside]], data.seed)
    prompts = [exercise.prompt for drawn in sets for exercise in drawn]
    assert len(set(prompts)) == len(prompts)
    limits = configs(base_models(cfg, tmp_path)[0])[0].data
    longest = max((e for drawn in sets for e in drawn), key=lambda exercise: len(exercise.worked))
    assert len(words(longest.worked).input_ids) < limits.max_demonstration_tokens
    assert max(map(len, prompts)) <= limits.max_prompt_tokens
    longest_verified = max(len(words(e.verified).input_ids) for e in sets[1])
    for run in runs(read("full").ablation("demonstrations"), tmp_path, "m")[:5]:
        assert longest_verified < configs(run)[0].data.max_demonstration_tokens
        assert f"max_new_tokens={configs(run)[0].rollout.max_new_tokens}" in run.jobs[-1].settings


def test_an_ablation_has_every_variant_on_one_model_and_seeds_of_the_grid(tmp_path: Path) -> None:
    cfg = read("full")
    for name, variants in cfg.ablations.items():
        grid = runs(cfg.ablation(name), tmp_path, name)
        assert {run.cell for run in grid} == {"llama_1m"}
        assert [(run.method, run.seed) for run in grid] == [(v, s) for s in cfg.seeds for v in variants]
        references = {run.method for run in grid if run.is_reference}
        assert len(references) == (name not in WITHOUT_HPT)
        algorithms = {configs(run)[0].algorithm.name for run in grid[: len(variants)]}
        assert algorithms == {"hpt"} or (name in COMPARES_METHODS and "hpt" in algorithms)
    with pytest.raises(ConfigError, match=r"did you mean gate\?; known: threshold"):
        cfg.ablation("gates")


def test_a_grid_can_be_done_size_by_size(tmp_path: Path) -> None:
    cfg = read("full")
    halves = [cfg.only([size], cfg.seeds) for size in ("1m", "5m")]
    parts = [{run.folder for run in runs(half, tmp_path, "m")} for half in halves]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {run.folder for run in runs(cfg, tmp_path, "m")}
    with pytest.raises(ConfigError, match="--sizes 7b: not in this lab; known: 1m, 5m"):
        cfg.only(["7b"], cfg.seeds)
    with pytest.raises(ConfigError, match="--seeds 9: not in this lab; known: 1, 2, 3, 4, 5"):
        cfg.only(cfg.sizes, [1, 9])


def test_a_size_or_seed_that_is_named_twice_is_done_once() -> None:
    chosen = read("full").only(["5m", "1m", "5m"], [2, 1, 2])
    assert (chosen.sizes, chosen.seeds) == (["5m", "1m"], [2, 1])


@pytest.mark.parametrize("name", ["swü", "x=1, [a]"])
def test_a_lab_may_have_any_folder(name: str, tmp_path: Path) -> None:
    cfg, folder = read("full"), tmp_path / name
    trained = runs(cfg.ablation("demonstrations"), folder, "m")[-1]
    for run, questions in ((base_models(cfg, folder)[0], "pretraining"), (trained, "verified")):
        (config,) = configs(run)
        assert config.run_dir == str(run.folder)
        assert Path(config.model.path).is_relative_to(folder)
        assert config.data.train_file == f"{folder}/data/{questions}.jsonl"
        assert config.data.heldout_file == f"{folder}/data/heldout.jsonl"
        asked = compose_evaluation(run.jobs[-1].settings)
        assert (asked.model, asked.run_dir) == (f"{run.folder}/hf", f"{run.folder}/eval")
        assert asked.benchmarks == [f"{folder}/data/heldout.jsonl"]


def test_an_ablation_on_a_chosen_size_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--ablation", "threshold", "--sizes", "5m", "--seeds", "2"]
    assert main(["lab", *chosen, "--out", str(tmp_path), "--dry-run"]) == 0
    names = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    variants = read("full").ablations["threshold"]
    assert names == ["# base llama_5m seed 20250904", *(f"# {name} llama_5m seed 2" for name in variants)]


def test_every_printed_command_can_be_pasted_into_a_shell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "my lab"
    assert main(["lab", "--quick", "--out", str(out), "--dry-run"]) == 0
    pasted = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    grid = [*base_models(read("quick"), out), *runs(read("quick"), out, "methods")]
    assert pasted == [["hpt", job.verb, *job.settings] for run in grid for job in run.jobs]
    save(tmp_path / "model", "llama", "1m", 1)
    (out / "data").mkdir(parents=True)
    (out / "data" / "heldout.jsonl").write_text('{"prompt": "1+1?", "answer": "2"}\n')
    monkeypatch.setattr("hpt_mega.launch.run", lambda *given: 0)
    for settings in (words[2:] for words in pasted if words[1] == "eval"):
        model = Path(settings[0].removeprefix("model="))
        model.parent.mkdir(parents=True)
        model.symlink_to(tmp_path / "model")
        assert main(["eval", *settings]) == 0


def test_a_folder_refuses_another_lab_s_settings_and_takes_more_seeds(tmp_path: Path) -> None:
    cfg = read("quick")
    keep(cfg, tmp_path)
    keep(replace(cfg, seeds=[*cfg.seeds, 99]), tmp_path)
    with pytest.raises(ConfigError, match=rf"runs of another lab \(steps was {cfg.steps}, is"):
        keep(replace(cfg, steps=cfg.steps + 2), tmp_path)


def test_a_lab_takes_no_folder_of_somebodys_own_files(tmp_path: Path) -> None:
    (tmp_path / "job0.out").touch()
    keep(read("quick"), tmp_path)
    (tmp_path / "mine").mkdir()
    keep(read("quick"), tmp_path)
    (tmp_path / "lab.yaml").unlink()
    with pytest.raises(ConfigError, match=r"holds mine and no lab\.yaml"):
        keep(read("quick"), tmp_path)


def test_stages_that_do_not_divide_the_steps_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab" / "odd.yaml").write_text(
        "steps: 7\nmethods: {both: [[algorithm=sft], [algorithm=grpo]]}"
    )
    monkeypatch.setattr("hpt_mega.lab.config.conf_dir", lambda: tmp_path)
    with pytest.raises(ConfigError, match="both has 2 stages that share 7 steps"):
        read("odd")
    assert LabConfig().cells == []


@pytest.mark.parametrize(
    ("portion", "expected"),
    [
        (
            "{kind: summ, size: 2, count: 3}",
            r"lab: data\.training\.1\.kind is 'summ', .*; did you mean sum\?",
        ),
        ("{kind: sum, size: 0, count: 3}", r"lab: data\.training\.1\.size is 0, expected 1 or above"),
    ],
)
def test_exercises_that_cannot_be_made_are_refused_by_their_key(
    portion: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lab").mkdir()
    good = "{kind: chain, size: 2, count: 3}"
    (tmp_path / "lab" / "odd.yaml").write_text(f"data: {{training: [{good}, {portion}]}}")
    monkeypatch.setattr("hpt_mega.lab.config.conf_dir", lambda: tmp_path)
    with pytest.raises(ConfigError, match=expected):
        read("odd")
