"""The folders that a run's model comes from: its config.json, and all that is missing in them.

Nothing is loaded here; weights are read by weights.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpt_mega.checkpoint.hf import INDEX, HFCheckpoint, read_config
from hpt_mega.checkpoint.megatron_folder import companions_for, is_megatron, iteration_folder
from hpt_mega.config import ModelConfig
from hpt_mega.resharding.mapping import family_for


def read_model(model: ModelConfig, key: str = "model.path") -> tuple[Mapping[str, Any], list[str]]:
    """The model's config.json (empty where it cannot be used) and what is wrong with its folders.

    `key` is what messages call model.path.
    """
    how = f"set {key} to a Hugging Face folder, or a Megatron checkpoint"
    if not model.path.strip():
        return {}, [f"{key} is empty; {how}"]
    folder = Path(model.path)
    if model.path == ModelConfig.path:
        how = f"make the demo's model by `python tools/prepare_demo_model.py --out {model.path}`, or {how}"
    if not folder.is_dir():
        return {}, [f"{key}={folder}: no such folder (looked for {folder.absolute()}); {how}"]
    if is_megatron(folder):
        return _read_megatron(model)
    if model.hf:
        return {}, [f"model.hf={model.hf} and model.path={folder} is no Megatron checkpoint; leave it out"]
    shape, problems = _read_companions(key, folder, how)
    if not any(folder.glob("*.safetensors")):
        problems.append(f"{key}={folder} holds no *.safetensors; {how}")
    elif shape:
        try:
            HFCheckpoint(folder)  # reads the files' headers: is one cut off, or missing?
        except KeyError as error:
            problems.append(f"{key}={folder}: {INDEX} has no {error}; copy the folder again")
        except (OSError, ValueError) as error:
            problems.append(f"{key}: {error}")
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
        config = read_config(folder)
    except (OSError, ValueError) as error:
        return {}, [*problems, f"{name}: {error}; {how}"]
    try:
        family_for(config).read_shape(config)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        return {}, [*problems, f"{name}={folder} cannot be built: {_said(error)}"]
    return config, problems


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"config.json: {type(error).__name__}: {error}"
