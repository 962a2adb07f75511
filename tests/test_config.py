"""Composition of a config: what the overrides give, and what a wrong one is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from hpt_mega.config import Config, ConfigError, changes, compose, conf_dir, fit, load, read_yaml, save
from hpt_mega.lab.config import LabConfig
from hpt_mega.objective import algorithm, rows
from hpt_mega.scheduler import gate

GROUPS = ("experiment", "model", "gate", "data", "rollout", "algorithm")


def test_an_override_changes_its_key_and_nothing_else() -> None:
    changed, default = compose(["parallel.pp=3"]), compose([])
    assert changed.parallel.pp == 3
    changed.parallel.pp = default.parallel.pp
    assert changed == default


def test_groups_and_their_keys_combine_with_an_experiment() -> None:
    cfg = compose(["experiment=demo", "parallel=tp3", "parallel.dp=2", "optimizer.lr=1e-3"])
    assert cfg.run_dir == "runs/demo"
    assert (cfg.parallel.tp, cfg.parallel.pp, cfg.parallel.dp) == (3, 1, 2)
    assert cfg.parallel.sequence_parallel
    assert cfg.optimizer.lr == 1e-3


@pytest.mark.parametrize(
    "experiment",
    ["lab/pretrain", "lab/train", *sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))],
)
def test_every_experiment_composes(experiment: str) -> None:
    assert isinstance(compose([f"experiment={experiment}"]), Config)


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_every_row_of_the_table_has_a_file_that_mirrors_it(row) -> None:
    cfg = compose([f"algorithm={row.name}"])
    assert cfg.algorithm.name == row.name
    assert algorithm(row.name, **cfg.algorithm.options).row == row
    parts = ("advantage", "reference", "stabilizer", "likelihood", "aggregation")
    assert set(parts) <= set(cfg.algorithm.options)


@pytest.mark.parametrize("name", sorted(path.stem for path in (conf_dir() / "gate").glob("*.yaml")))
def test_every_gate_file_names_a_gate_and_options_it_has(name: str) -> None:
    chosen = compose([f"gate={name}"]).gate
    assert gate(chosen.name, **chosen.options).name == chosen.name


def test_a_part_of_an_algorithm_is_swapped_by_its_name() -> None:
    options = compose(
        ["algorithm=grpo", "algorithm.stabilizer=cis_mask", "algorithm.clip_high=0.28"]
    ).algorithm.options
    row = algorithm("grpo", **options).row
    assert (row.parts.stabilizer, row.options.clip_high, row.options.clip_low) == ("cis_mask", 0.28, 0.2)


def test_options_may_be_given_together_beside_those_that_a_name_brings() -> None:
    cfg = compose(["algorithm=grpo", "algorithm.options={clip_high: 0.28}", "gate.options={threshold: 0.5}"])
    assert cfg == compose(["algorithm=grpo", "algorithm.clip_high=0.28", "gate.threshold=0.5"])


def test_an_algorithm_brings_its_gate_and_the_command_line_overrules_it() -> None:
    assert compose(["algorithm=grpo"]).gate.options == {"threshold": -1.0}
    assert compose(["algorithm=luffy"]).gate.name == "soft"
    assert compose(["algorithm=hpt", "gate=three_zone"]).gate.name == "three_zone"


def test_a_saved_config_is_loaded_as_it_was(tmp_path: Path) -> None:
    cfg = compose(["experiment=demo", "algorithm=luffy", "gate.threshold=0.25", "data.tasks.0.weight=3"])
    save(cfg, tmp_path / "run" / "config.yaml")
    assert load(tmp_path / "run" / "config.yaml") == cfg
    assert cfg.gate.options == {"threshold": 0.25}
    assert cfg.data.tasks[0].weight == 3.0


@pytest.mark.parametrize(
    "text",
    ["plain", r"\boxed{a}", "${seed}", r"\${x}", r"\\${x} \${y}", "a${b}c", "${answer}", "${", "a: {b}\n"],
)
def test_a_saved_text_is_loaded_as_it_was_whatever_it_holds(text: str, tmp_path: Path) -> None:
    cfg = compose([])
    cfg.data.instruction, cfg.optimizer.frozen = text, [text]
    cfg.algorithm.options["note"] = text
    cfg.data.tasks[0].options["note"] = text
    save(cfg, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == cfg


def test_an_escaped_interpolation_survives_its_run_folder(tmp_path: Path) -> None:
    save(compose([r"data.instruction=\${seed}"]), tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml").data.instruction == "${seed}"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("paralel.pp=3", "did you mean parallel.pp"),
        ("paralel=pp3", "did you mean parallel or "),
        ("experimnt=demo", "did you mean experiment?"),
        ("parallel.pipeline=3", "unknown key parallel.pipeline"),
        ("lr=1e-4", "did you mean optimizer.lr or critic.lr?"),
        ("seed.x=1", "nothing lies below seed"),
        ("parallel.pp=two", "expected a whole number"),
        ("trainer.deterministic=perhaps", "expected true or false"),
        ("gate.threshold=high", "expected a number"),
        ("parallel.pp=2,3", "parallel.pp=2,3"),
        ("run_dir=a=b", "quote a value"),
        ("run_dir=runs/a,b", "expected one; quote a text with commas: 'run_dir=\"runs/a,b\"'"),
        ("gate.threshold=1,2", "gate.options.threshold=1,2: several values, expected one"),
        ("seed=choice(1,2)", "or sweep with slurm/ablation.sh"),
        *((f"{group}=null", f"{group}=null: a group cannot be empty; leave it out") for group in GROUPS),
        ("trainer=4", "trainer.steps"),
        ("algorithm=grp", "did you mean grpo"),
        ("algorithm.name=grpo", "algorithm=grpo"),
        ("experiment=nope", "known: demo, hpt_70b, hpt_7b, hpt_moe, lab/pretrain, lab/train, tiny"),
        ("demo", "expected KEY=VALUE"),
        ("+parallel.cp=2", "expected KEY=VALUE without a + or ~ before it"),
        ("~trainer", "expected KEY=VALUE without a + or ~ before it"),
        ("lab=full", "conf/lab is another command's; groups to choose from: model, parallel, "),
        (
            "optimizer.groups=[{lr_scael: 1}]",
            "lr_scael: Key 'lr_scael' not in 'ParameterGroup'; did you mean lr_scale?; known: match, ",
        ),
        (
            "data.mixture=[{file: a, columns: {prmpt: x}}]",
            "'prmpt' not in 'ColumnsConfig'; did you mean prompt?; known",
        ),
        ("data.train_file=größe.jsonl", "only a quoted value may hold; quote a value"),
        ("data.train_file=größe.jsonl", "'data.train_file=\"größe.jsonl\"'"),
        ("algorithm.clip_high=größe", "cannot read 'algorithm.options.clip_high=größe'"),
    ],
)
def test_a_wrong_override_is_told_what_was_expected(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose([override])
    assert expected in str(refused.value)


def test_a_file_of_conf_that_hydra_cannot_use_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = shutil.copytree(conf_dir(), tmp_path / "conf")
    (conf / "experiment" / "mine.yaml").write_text("defaults: [{a: b, c: d}]\n")
    monkeypatch.setattr("hpt_mega.config.conf_dir", lambda: conf)
    with pytest.raises(ConfigError, match="experiment/mine: Too many keys"):
        compose(["experiment=mine"])


def test_a_wrong_override_leaves_no_trace_for_the_next_composition() -> None:
    before = compose([])
    with pytest.raises(ConfigError):
        compose(["parallel.pp=two"])
    assert compose([]) == before


def test_a_file_with_a_misspelt_key_is_refused_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data:\n  tasks:\n  - {name: gcd, wieght: 2}\n")
    with pytest.raises(ConfigError, match=r"config\.yaml.*wieght"):
        load(path)
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seeds: many\n", r"lab\.yaml: seeds: .*; expected a list"),
        (
            "data: {training: [{kind: sum, size: two, count: 1}]}\n",
            r"lab\.yaml: size: .*expected a whole number",
        ),
        ("stepps: 3\n", r"stepps: .*; did you mean steps\?"),
        ("- 1\n", "holds a list; expected a lab"),
        ("a: [1\n", r"expected ',' or '\]'.*; expected a lab"),
        (
            "data: {heldout: [{kind: sum, sise: 2}]}\n",
            r"sise: Key 'sise' not in 'Portion'; did you mean size\?",
        ),
        ("only words", "Key 'only words' not in 'LabConfig'"),
    ],
)
def test_any_file_that_does_not_fit_its_schema_is_told_the_key_and_what_was_expected(
    text: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "lab.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        fit(LabConfig, str(path), read_yaml(path, "a lab"))
    with pytest.raises(ConfigError, match=r"Is a directory.*; expected a lab"):
        read_yaml(tmp_path, "a lab")


def test_two_configs_differ_by_their_dotted_keys_but_for_those_that_are_free() -> None:
    earlier, now = compose([]), compose(["parallel.pp=3", "run_dir=elsewhere", "trainer.steps=7"])
    assert changes(earlier, now, ("run_dir", "trainer")) == [f"parallel.pp was {earlier.parallel.pp}, is 3"]
    assert changes(earlier, earlier) == []
    (change,) = changes(LabConfig(), LabConfig(seeds=list(range(99))))
    assert change.startswith("seeds was [], is [0, 1, 2, ") and change.endswith("...")


@pytest.mark.parametrize(("instructions", "dtype"), [({"avx2"}, "fp32"), ({"avx2", "amx_bf16"}, "bf16")])
def test_the_demo_multiplies_in_what_the_processor_can(
    instructions: set[str], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {name: name in instructions for name in ("avx2", "avx512_bf16", "amx_bf16")}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compose(["experiment=demo"]).precision.dtype == dtype
    assert compose(["experiment=demo", "precision=fp16"]).precision.dtype == "fp16"
