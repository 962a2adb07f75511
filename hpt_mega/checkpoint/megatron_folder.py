"""Where things are in a Megatron checkpoint's folder: the newest weights, and the config that came along.

What is in the files is read by torch_dist.py and legacy.py.
"""

from __future__ import annotations

import re
from pathlib import Path

COMPANIONS = "hf"  # the folder of config, tokenizer and chat template within a converted checkpoint
TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # what Megatron calls weights without a training state
TORCH_DIST = ".metadata"  # the file that tells the format torch_dist
LEGACY_RANK = re.compile(r"mp_rank_(\d{2})(?:_(\d{3}))?(?:_(\d{3}))?")


def is_megatron(folder: Path) -> bool:
    """Does the folder say that it is a Megatron checkpoint? What its tracker names may still be missing."""
    return folder.is_dir() and (
        (folder / TRACKER).is_file() or (folder / TORCH_DIST).is_file() or is_legacy(folder)
    )


def is_legacy(folder: Path) -> bool:
    return any(LEGACY_RANK.fullmatch(path.name) for path in folder.iterdir())


def iteration_folder(folder: Path) -> Path:
    """Where the weights are, below a folder as Megatron's --save and --load take it.

    Raises FileNotFoundError where they are not.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; expected a Megatron checkpoint")
    tracker = folder / TRACKER
    if tracker.is_file():
        iteration = tracker.read_text().strip()
        if iteration != RELEASE and not iteration.isdecimal():
            raise ValueError(f"{tracker} says {iteration!r}; expected a number, or {RELEASE}")
        folder = folder / (iteration if iteration == RELEASE else f"iter_{int(iteration):07d}")
    if not folder.is_dir() or not ((folder / TORCH_DIST).is_file() or is_legacy(folder)):
        raise FileNotFoundError(
            f"{folder} holds neither {TORCH_DIST} (torch_dist) nor mp_rank_* (legacy); expected a Megatron "
            "checkpoint, copied whole"
        )
    return folder


def companions_of(megatron: Path) -> Path | None:
    """The config and tokenizer that a converted checkpoint carries along; None where there are none."""
    folders = (megatron / COMPANIONS, megatron.parent / COMPANIONS)
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def companions_for(path: Path, given: str) -> Path:
    """The folder of config and tokenizer for weights at `path`: `given` if any, else what belongs to them."""
    if given or not is_megatron(path):
        return Path(given or path)
    return companions_of(path) or path / COMPANIONS
