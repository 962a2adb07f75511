"""The training data: tasks, files and mixtures, and the files of debug.replay."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpt_mega.config import Config
from hpt_mega.data.demonstrations import OPTIONS, WRITERS
from hpt_mega.data.files import HUB, is_data
from hpt_mega.data.store import is_prepared
from hpt_mega.replay import read_batches
from hpt_mega.suggestion import did_you_mean


def tasks(cfg: Config) -> Iterator[str]:
    """Whether there is something to train on and to hold out, and how it is mixed."""
    if cfg.data.mixture and cfg.data.train_file:
        yield "data.train_file and data.mixture are both given; put the file into the mixture"
    if not 0 < cfg.data.keep_solved <= 1:
        yield f"data.keep_solved is {cfg.data.keep_solved}, expected above 0 and at most 1"
    if cfg.data.keep_solved < 1 and cfg.rollout.staleness:
        yield (
            f"data.keep_solved is {cfg.data.keep_solved} and rollout.staleness {cfg.rollout.staleness}: a "
            "step's questions are drawn before it is known which of the last were solved; set staleness 0"
        )
    has_training = cfg.data.train_file or cfg.data.mixture
    if not cfg.data.tasks and not (has_training and cfg.data.heldout_file):
        yield "data.tasks is empty; name a task, or choose a group such as data=demo"
    for index, task in enumerate(cfg.data.tasks):
        if task.name not in WRITERS:
            yield f"data.tasks.{index}.name is {task.name!r}, expected one of {', '.join(WRITERS)}"
        for option in task.options.keys() - set(OPTIONS.get(task.name, task.options)):
            known = OPTIONS[task.name]
            yield (
                f"data.tasks.{index}.options: {task.name} has no option {option!r}"
                f"{did_you_mean(option, known)}; known: {', '.join(known)}"
            )
    weights = {f"data.tasks.{i}.weight": task.weight for i, task in enumerate(cfg.data.tasks)}
    weights |= {f"data.mixture.{i}.weight": part.weight for i, part in enumerate(cfg.data.mixture)}
    for key, weight in weights.items():
        if not weight > 0:
            yield f"{key} is {weight}, expected above 0"


def files(cfg: Config) -> Iterator[str]:
    """Whether the files are there, and of a known kind."""
    files = {"data.train_file": cfg.data.train_file, "data.heldout_file": cfg.data.heldout_file}
    files |= {f"data.mixture.{i}.file": part.file for i, part in enumerate(cfg.data.mixture)}
    for key, file in files.items():
        if file and not is_prepared(file):
            yield from known_file(key, file)
    yield from _debug(cfg)


def known_file(key: str, file: str) -> Iterator[str]:
    """Whether a file of questions is there, or can be asked of the hub."""
    if not is_data(file):
        yield (
            f"{key}={file}: expected a file .jsonl, .json or .parquet, {HUB}OWNER/NAME, or a folder of "
            "tools/prepare_data.py"
        )
    elif not file.startswith(HUB) and not Path(file).is_file():
        yield f"{key}={file}: no such file (looked for {Path(file).absolute()})"


def _debug(cfg: Config) -> Iterator[str]:
    if not cfg.debug.replay:
        return
    if cfg.debug.save:
        yield "debug.save and debug.replay are both set; what is replayed is in a file already: drop save"
    file = Path(cfg.debug.replay)
    if not file.is_file():
        yield f"debug.replay={file}: no such file (looked for {file.absolute()}); debug.save=FILE writes one"
        return
    try:
        steps = read_batches(file).keys()
    except ValueError as error:
        yield f"debug.replay: {error}"
        return
    if missing := [step for step in range(1, cfg.trainer.steps + 1) if step not in steps]:
        yield (
            f"debug.replay={file} holds {len(steps)} steps and no step {missing[0]}; "
            f"trainer.steps is {cfg.trainer.steps}"
        )
