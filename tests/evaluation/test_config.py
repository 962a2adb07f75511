"""The config of an evaluation: what a folder of before still says, and when it is another evaluation's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hpt_mega.config import ConfigError, ParallelConfig, PrecisionConfig, RewardConfig, ServerConfig, save
from hpt_mega.evaluation.config import SHORTENED, EvalConfig, check_resumable, compose, load
from hpt_mega.evaluation.engines import job_config

SETTINGS = ["model=m", "benchmarks=[aime24]", "parallel.dp=2", "precision.dtype=fp32", "reward.workers=3"]


def test_a_folder_of_before_whose_sections_were_the_trainers_is_gone_on_with(tmp_path: Path) -> None:
    cfg, path = compose(SETTINGS), tmp_path / "config.yaml"
    trainers = {
        "server": ServerConfig(kv_cache_gib=2),
        "parallel": ParallelConfig(pp=1, dp=2),
        "precision": PrecisionConfig(dtype="fp32"),
        "reward": RewardConfig(workers=3),
    }
    assert set(trainers) == set(SHORTENED)
    longer = asdict(cfg) | {section: asdict(part) for section, part in trainers.items()}
    OmegaConf.save(longer, path)
    earlier = load(path)
    check_resumable(compose([*SETTINGS, "server.kv_cache_gib=2"]), earlier)
    with pytest.raises(ConfigError, match=r"another evaluation \(server\.kv_cache_gib was 2, is 1\)"):
        check_resumable(cfg, earlier)
    OmegaConf.save(longer | {"kay": 4}, path)
    with pytest.raises(ConfigError, match=r"config\.yaml: kay: "):
        load(path)
    OmegaConf.save(longer | {"parallel": "oops"}, path)
    with pytest.raises(ConfigError, match=r"config\.yaml: .* LayoutConfig"):
        load(path)


def test_a_kept_config_is_loaded_as_it_was(tmp_path: Path) -> None:
    cfg = compose([*SETTINGS, "parallel.stage_layers=[3,4]", "columns.prompt=problem"])
    save(cfg, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == cfg


def test_what_cannot_change_a_response_is_free_on_resumption() -> None:
    cfg = compose(SETTINGS)
    check_resumable(cfg, compose([*SETTINGS, "max_new_tokens=8192"]))  # the default of before
    check_resumable(cfg, compose([*SETTINGS, "run_dir=b", "level=0.9", "training_columns.prompt=p"]))
    with pytest.raises(ConfigError, match=r"\(parallel\.dp was 4, is 2; seed was 1, is 1234\)"):
        check_resumable(cfg, compose([*SETTINGS, "parallel.dp=4", "seed=1"]))


def test_every_key_of_a_section_has_the_trainers_name_and_default_and_reaches_the_job() -> None:
    cfg = EvalConfig()
    for section, trainers in (
        (cfg.server, ServerConfig()),
        (cfg.parallel, ParallelConfig(pp=1)),
        (cfg.precision, PrecisionConfig()),
        (cfg.reward, RewardConfig()),
    ):
        assert asdict(section).items() <= asdict(trainers).items()
    job = job_config(compose([*SETTINGS, "parallel.ep=2", "parallel.stage_layers=[3,4]"]))
    assert job.parallel == ParallelConfig(pp=1, dp=2, ep=2, stage_layers=[3, 4])
    assert job.precision.dtype == "fp32"


def test_a_text_is_emptied_by_its_key_alone_and_one_that_yaml_takes_apart_is_named() -> None:
    cfg = compose([*SETTINGS, "published=", "instruction=1+1="])
    assert (cfg.published, cfg.instruction) == ("", "1+1=")
    assert compose([*SETTINGS, "instruction='a: b'"]).instruction == "a: b"
    with pytest.raises(ConfigError, match=r"instruction: got .*, expected a text; quote it twice: 'instr"):
        compose([*SETTINGS, "instruction=a: b"])
    with pytest.raises(ConfigError, match="k: Value '' of type 'str' could not be converted to Integer"):
        compose([*SETTINGS, "k="])
