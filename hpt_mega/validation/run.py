"""The run folder: whether a run has begun there that this one would overwrite."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpt_mega.config import Config, changes, load


def folder(cfg: Config) -> Iterator[str]:
    """Whether the run folder can be used: a folder, and no other run's."""
    run_dir = Path(cfg.run_dir)
    if run_dir.exists() and not run_dir.is_dir():
        yield f"run_dir={run_dir} is a file; choose another folder"
    if cfg.resume == "never" and _is_unfinished(run_dir):
        yield f"run_dir={run_dir} holds an unfinished run; set resume=auto to go on, or another run_dir"
    if cfg.resume == "auto" and (run_dir / "summary.json").is_file():
        yield from _of_another_run(cfg, run_dir)


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


def _is_unfinished(run_dir: Path) -> bool:
    """Whether a run has begun there and not ended."""
    return (run_dir / "metrics.jsonl").is_file() and not (run_dir / "summary.json").is_file()
