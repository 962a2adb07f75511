"""The verb `hpt checkpoints`: which a run has, whether they are whole, and the removal of old ones.

How they are written and found again is in store.py.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from hpt_mega.config import ConfigError

if TYPE_CHECKING:
    from hpt_mega.checkpoint.store import CheckpointStore

NOT_WHOLE = 1  # exit code of verify: a checkpoint is damaged, or there is none


def configure(parser: argparse.ArgumentParser) -> None:
    """Give the verb's parser its options."""
    parser.description = (
        "The checkpoints of a run: list them, verify their files, remove old ones and those set aside."
    )
    parser.epilog = (
        "example: hpt checkpoints list runs/demo; hpt checkpoints verify runs/demo (exit code 1 where one is "
        "damaged, or there is none); hpt checkpoints prune runs/demo --keep 1"
    )
    parser.add_argument("what", choices=("list", "verify", "prune"))
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--keep",
        type=int,
        default=2,
        metavar="N",
        help="prune: leave the N newest (2), and none that was set aside",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from hpt_mega.checkpoint.store import CheckpointStore, damage

    if not (options.run_dir / "config.yaml").is_file():
        raise ConfigError(f"{options.run_dir} holds no config.yaml; expected the run_dir of `hpt train`")
    if options.keep < 1:
        raise ConfigError(f"--keep is {options.keep}, expected 1 or above")
    store = CheckpointStore(options.run_dir, options.keep)
    if options.what == "prune":
        return _prune(store, options.keep)
    code = 0
    for step in store.steps():
        line = f"step {step}: {_contents(store.path(step))}"
        if options.what == "verify":
            found = damage(store.path(step))
            code = NOT_WHOLE if found else code
            line += f"; damaged: {'; '.join(found)}" if found else "; whole"
        print(line)
    if not store.steps():
        print(f"{options.run_dir} has no checkpoints")
        code = NOT_WHOLE if options.what == "verify" else 0
    for folder in store.aside():
        print(f"{folder.name}: {_contents(folder)}; damaged or another run's, prune removes it")
    return code


def _prune(store: CheckpointStore, keep: int) -> int:
    aside = store.aside()
    for folder in aside:
        shutil.rmtree(folder)
    removed = [*map(str, store.prune(keep)), *(folder.name for folder in aside)]
    print(f"removed: {', '.join(removed) or 'nothing'}; left: {_names(store.steps())}")
    return 0


def _contents(folder: Path) -> str:
    files = [path for path in folder.rglob("*") if path.is_file()]
    gib = sum(path.stat().st_size for path in files) / 2**30
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(folder.stat().st_mtime))
    return f"{gib:.2f} GiB in {len(files)} files, {written}"


def _names(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "nothing"
