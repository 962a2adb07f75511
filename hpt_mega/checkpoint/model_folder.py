"""The folders that a run's model comes from: its config.json, and all that is missing in them.

Nothing is loaded here; weights are read by weights.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpt_mega.checkpoint.hf import HFCheckpoint, read_config
from hpt_mega.checkpoint.megatron_folder import companions_for, is_megatron, iteration_folder
from hpt_mega.config import ModelConfig


def read_model(model: ModelConfig) -> tuple[Mapping[str, Any], list[str]]:
    """The model's config.json (empty where unreadable) and what is wrong with its folders."""
    how = "set model.path to a Hugging Face folder, or a Megatron checkpoint"
    if not model.path.strip():
        return {}, [f"model.path is empty; {how}"]
    folder = Path(model.path)
    if model.path == ModelConfig.path:
        how = f"make the demo's model by `python tools/prepare_demo_model.py --out {model.path}`, or {how}"
    if not folder.is_dir():
        return {}, [f"model.path={folder}: no such folder (looked for {folder.absolute()}); {how}"]
    if is_megatron(folder):
        return _read_megatron(model)
    if model.hf:
        return {}, [f"model.hf={model.hf} and model.path={folder} is no Megatron checkpoint; leave it out"]
    shape, problems = _read_companions("model.path", folder, how)
    if not any(folder.glob("*.safetensors")):
        problems.append(f"model.path={folder} holds no *.safetensors; {how}")
    elif shape:
        try:
            HFCheckpoint(folder)  # reads the files' headers: is one cut off, or missing?
        except (OSError, ValueError) as error:
            problems.append(f"model.path: {error}")
    return shape, problems


def _read_megatron(model: ModelConfig) -> tuple[Mapping[str, Any], list[str]]:
    how = "set model.hf to the Hugging Face folder of the model that this Megatron checkpoint began from"
    name = "model.hf" if model.hf else "model.path"
    shape, problems = _read_companions(name, companions_for(Path(model.path), model.hf), how)
    try:
        iteration_folder(Path(model.path))
    except (OSError, ValueError) as error:
        problems.append(f"model.path: {error}")
    return shape, problems


def _read_companions(name: str, folder: Path, how: str) -> tuple[Mapping[str, Any], list[str]]:
    problems = []
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        problems.append(f"{name}={folder} holds no tokenizer.json; {how}")
    try:
        return read_config(folder), problems
    except (OSError, ValueError) as error:
        return {}, [*problems, f"{name}: {error}; {how}"]
