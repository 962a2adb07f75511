"""The run folder: whether another run, or somebody's own files, are there, which this one would overwrite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpt_mega.config import Config, ConfigError, changes, load, read_yaml
from hpt_mega.files import OUTPUT_OF_JOBS, strangers

SECTIONS = {"algorithm", "gate", "run_dir"}  # which the config.yaml of any run has
# what others put there before training: slurm/common.sh, hpt serve, hpt lab, and whoever keeps the output
BEFORE = ("logs", "preflight", "label.json", "stage*", *OUTPUT_OF_JOBS)
OF_A_RUN = ("metrics.jsonl", "summary.json", "checkpoints")  # any of them


def folder(cfg: Config) -> Iterator[str]:
    """Whether the run folder can be used: a folder, no other run's, and not one of somebody's own files."""
    if not cfg.run_dir.strip():
        yield "run_dir is empty; name a folder, for instance run_dir=runs/first"
        return
    run_dir = Path(cfg.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        yield f"run_dir={run_dir} is a file; choose another folder"
        return
    if run_dir.is_dir() and (found := _foreign(run_dir)):
        yield f"run_dir={run_dir} {found}; choose a folder that is empty or does not exist"
        return
    if cfg.resume == "never" and _is_unfinished(run_dir):
        yield f"run_dir={run_dir} holds an unfinished run; set resume=auto to go on, or another run_dir"
    if (run_dir / "summary.json").is_file():
        yield from _of_another_run(cfg, run_dir) if cfg.resume == "auto" else _read_from_there(cfg, run_dir)


def _foreign(run_dir: Path) -> str:
    """Why the folder's files are not those of a run of hpt train; empty where they are, or there are none."""
    config = run_dir / "config.yaml"
    if config.is_file():
        refusal = "holds a config.yaml that `hpt train` has not written"
        try:
            given = read_yaml(config, "the config of a run")
        except ConfigError:
            return refusal
        return "" if given.keys() >= SECTIONS else refusal
    if any((run_dir / name).exists() for name in OF_A_RUN):
        return ""
    others = strangers(run_dir, BEFORE)
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return f"holds {', '.join(others[:3])}{more}, and no run of `hpt train`" if others else ""


def _of_another_run(cfg: Config, run_dir: Path) -> Iterator[str]:
    """Where a finished run of other settings would be reported as this one. More steps go on with it."""
    earlier = load(run_dir / "config.yaml")
    if cfg.trainer.steps > earlier.trainer.steps:
        return
    if changed := changes(earlier, cfg, ("run_dir", "resume")):
        yield (
            f"run_dir={run_dir} holds a finished run of other settings ({'; '.join(changed[:4])}); choose "
            "another run_dir, or resume=never, which renames that folder"
        )


def _read_from_there(cfg: Config, run_dir: Path) -> Iterator[str]:
    """What the run would not find, for a finished run's folder is renamed before the new one starts."""
    read = {"model.path": cfg.model.path, "model.hf": cfg.model.hf, "debug.replay": cfg.debug.replay}
    read |= {"data.train_file": cfg.data.train_file, "data.heldout_file": cfg.data.heldout_file}
    read |= {f"data.mixture.{i}.file": part.file for i, part in enumerate(cfg.data.mixture)}
    for key, file in read.items():
        if file and Path(file).resolve().is_relative_to(run_dir.resolve()):
            yield (
                f"{key}={file} lies in run_dir={run_dir}, whose finished run would be renamed first; choose "
                "another run_dir"
            )


def _is_unfinished(run_dir: Path) -> bool:
    """Whether a run has begun there and not ended."""
    return (run_dir / "metrics.jsonl").is_file() and not (run_dir / "summary.json").is_file()
