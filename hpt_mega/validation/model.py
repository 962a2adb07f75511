"""The model's folder, and whether its positions suffice for the lengths of the run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpt_mega.config import Config


def read(folder: Path) -> tuple[Mapping[str, Any], list[str]]:
    """The model's config.json (empty where unreadable) and what is wrong with the folder."""
    how = (
        "set model.path to a Hugging Face folder; the demo's is made by "
        f"`python tools/prepare_demo_model.py --out {folder}`"
    )
    if not folder.is_dir():
        return {}, [f"model.path={folder}: no such folder (looked for {folder.absolute()}); {how}"]
    problems = []
    if not any(folder.glob("*.safetensors")):
        problems.append(f"model.path={folder} holds no *.safetensors; {how}")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        problems.append(f"model.path={folder} holds no tokenizer.json; {how}")
    try:
        shape = json.loads((folder / "config.json").read_text())
    except FileNotFoundError:
        return {}, [*problems, f"model.path={folder} holds no config.json; {how}"]
    except ValueError as error:
        return {}, [*problems, f"{folder}/config.json is no JSON: {error}; {how}"]
    return shape, problems


def lengths(cfg: Config, shape: Mapping[str, Any]) -> Iterator[str]:
    """Whether the longest prompt and response fit the model's positions."""
    positions = cfg.model.max_positions or shape.get("max_position_embeddings")
    response = max(cfg.rollout.max_new_tokens, cfg.data.max_demonstration_tokens)
    longest = cfg.data.max_prompt_tokens + response
    if positions and longest > positions:
        yield (
            f"data.max_prompt_tokens {cfg.data.max_prompt_tokens} + the longest response {response} = "
            f"{longest} tokens and the model has {positions} positions; lower rollout.max_new_tokens, "
            "data.max_demonstration_tokens or data.max_prompt_tokens"
        )
