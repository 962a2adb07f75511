r"""Models from scratch: a tokenizer of single characters, and random weights of a family and size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from hpt_mega.files import writing_folder

END, BOX = "<|endoftext|>", "\\boxed{"
CHARACTERS = "0123456789+-*=?}\n"
POSITIONS = 256
SIZES: dict[str, dict[str, int]] = {  # parameters, the few of the embedding included
    "1m": {"hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": 4, "num_attention_heads": 4},
    "5m": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 8},
}
FAMILIES: dict[str, tuple[type[Any], dict[str, Any]]] = {  # what tells the families apart in their releases
    "llama": (LlamaConfig, {"rope_theta": 10_000.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}),
}


def tokenizer() -> PreTrainedTokenizerFast:
    r"""One token a character, and one for "\boxed{".

    In form it is a byte-level BPE without merges whose end is <|endoftext|>: AutoTokenizer gives a Qwen2
    folder its own splitting whatever tokenizer.json says, and only such a one reads the same under both.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = [byte_level.pre_tokenize_str(character)[0][0] for character in CHARACTERS]
    vocabulary = {word: number for number, word in enumerate((END, BOX, *symbols))}
    made = Tokenizer(models.BPE(vocabulary, merges=[]))
    made.pre_tokenizer = byte_level
    made.decoder = decoders.ByteLevel()
    made.add_tokens([AddedToken(BOX, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=END,
        pad_token=END,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def save(folder: Path, family: str, size: str, seed: int) -> None:
    """Save random weights with their tokenizer as a Hugging Face folder, whole whenever it exists."""
    words = tokenizer()
    config_class, traits = FAMILIES[family]
    shape = SIZES[size]
    config = config_class(
        vocab_size=len(words),
        max_position_embeddings=POSITIONS,
        num_key_value_heads=shape["num_attention_heads"] // 2,
        eos_token_id=words.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
        dtype="float32",
        **shape,
        **traits,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    with writing_folder(folder) as aside:
        model.save_pretrained(aside)
        words.save_pretrained(aside)
