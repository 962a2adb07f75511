"""Whether the positions of the model suffice for the lengths of the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from hpt_mega.config import Config


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
