"""A model small enough to start and train in seconds, with the demo's tokenizer, and settings to train it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

CLOCKED = ("timing", "sync/send_s", "sync/verify_s", "sync/gb_per_s")
TOKENIZER = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"


def save_toy(folder: Path, *, head_dim: int = 8) -> Path:
    """Random weights, 1.6 M of them, nearly all in the embedding that the tokenizer asks for.

    vLLM's CPU attention asks for a head_dim of 32.
    """
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(TOKENIZER / name, folder / name)
    return folder


def settings(model: Path) -> list[str]:
    """Overrides for a run of the toy model that is the same bit for bit whenever it is made."""
    return [
        f"model.path={model}",
        "data.tasks=[{name: products, options: {min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}}]",
        "data.train_questions=24",
        "data.heldout_questions=3",
        "rollout.rollouts_per_question=2",
        "rollout.max_new_tokens=12",
        "trainer.questions_per_step=2",
        "trainer.tokens_per_microbatch=400",
        "trainer.deterministic=true",
        "trainer.export_hf=false",
        "optimizer.lr=1e-3",
    ]


def right(response: str, answer: str) -> float:
    """A reward for anything, with which `algorithm=reinforce` trains on every rollout."""
    return 1.0


ON_ALL_ROLLOUTS = ("algorithm=reinforce", "gate=rollouts", f"reward.kind={__name__}.right")


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured."""
    file = run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    return [{key: value for key, value in record.items() if key not in CLOCKED} for record in records]
