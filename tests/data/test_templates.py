"""Prompts by name: the tokenizer's chat, and the authors' texts word for word."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from hpt_mega.data.templates import render, stop_tokens
from tests.data.byte_tokenizer import byte_tokenizer

QUESTION = [("user", "What is $1+1$?")]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def test_the_authors_prompts_are_these(tokenizer: PreTrainedTokenizerFast) -> None:
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    assert render("qwen_math", QUESTION, tokenizer) == (
        f"<|im_start|>system\n{boxed}<|im_end|>\n<|im_start|>user\nWhat is $1+1$?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert render("llama_base", QUESTION, tokenizer) == (
        f"Question:\nWhat is $1+1$?\n{boxed}\nAnswer:\nLet's think step by step."
    )


def test_a_given_system_message_takes_the_place_of_qwens(tokenizer: PreTrainedTokenizerFast) -> None:
    text = render("qwen_math", [("system", "Be brief."), *QUESTION], tokenizer)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "Please" not in text


def test_chat_is_the_tokenizers_own(tokenizer: PreTrainedTokenizerFast) -> None:
    assert render("chat", QUESTION, tokenizer) == "<u>What is $1+1$?<e><a>"
    assert stop_tokens("chat", tokenizer) == (tokenizer.eos_token_id,)


def test_a_templates_stop_tokens_count_where_the_tokenizer_has_them() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    ends = tokenizer.convert_tokens_to_ids(["<e>", "<|im_end|>"])
    assert stop_tokens("qwen_math", tokenizer) == tuple(ends)


def test_an_unknown_template_and_a_missing_chat_are_refused() -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="template is 'qwen', expected one of chat, qwen_math"):
        render("qwen", QUESTION, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(
        ValueError, match="has no chat template; use an instruct model, or a template by name"
    ):
        render("chat", QUESTION, tokenizer)
