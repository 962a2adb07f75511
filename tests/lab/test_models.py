"""The lab's models from scratch: the size that is said, and a tokenizer that loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hpt_mega.lab.exercises import Portion, draw
from hpt_mega.lab.models import BOX, END, FAMILIES, SIZES, save, tokenizer


def test_every_demonstration_survives_the_tokenizer_and_a_box_opens_with_one_token() -> None:
    words = tokenizer()
    (drawn,) = draw([[Portion("sum", 3, 20), Portion("difference", 3, 20), Portion("product", 3, 20)]], 1)
    for exercise in drawn:
        text = exercise.prompt + exercise.worked
        tokens = words(text, add_special_tokens=False).input_ids
        assert words.decode(tokens) == text
        assert len(tokens) == len(text) - len(BOX) + 1
    assert words.eos_token == END
    assert words.eos_token_id not in words("1+2?\\boxed{3}", add_special_tokens=False).input_ids


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_has_its_family_s_form_and_the_size_of_its_name(tmp_path: Path, family: str) -> None:
    for size, millions in (("1m", 1), ("5m", 5)):
        save(tmp_path / size, family, size, seed=3)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / size)
        assert model.num_parameters() == pytest.approx(1e6 * millions, rel=0.15)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "1m")
    assert model.config.model_type == family
    assert (model.model.layers[0].self_attn.q_proj.bias is not None) == (family == "qwen2")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "1m")) == model.config.vocab_size
    text = "47+85?7+5=12\n4+8+1=13\n\\boxed{132}"
    words = AutoTokenizer.from_pretrained(tmp_path / "1m")  # for Qwen2 of a class of its own
    tokens = words(text, add_special_tokens=False).input_ids
    assert tokens == tokenizer()(text, add_special_tokens=False).input_ids
    assert words.decode(tokens, skip_special_tokens=True) == text
    assert words.eos_token_id == model.config.eos_token_id == 0
    assert len(SIZES) == 2


def test_weights_follow_from_the_seed_and_the_caller_s_random_state_is_left_alone(tmp_path: Path) -> None:
    torch.manual_seed(8)
    expected = torch.rand(3)
    torch.manual_seed(8)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        save(tmp_path / name, "llama", "1m", seed)
    assert torch.equal(torch.rand(3), expected)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c
