"""From a question's messages to the text a model continues: the tokenizer's own template, or a named one.

The authors' prompts are those of arXiv 2509.04419's training and of LUFFY's evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hpt_mega.data.files import Message

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."


def _chatml(messages: Sequence[Message]) -> str:
    """Qwen2.5-Math's chat, whose system message is BOXED unless another is given."""
    given = list(messages) if messages[0][0] == "system" else [("system", BOXED), *messages]
    turns = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in given)
    return f"{turns}<|im_start|>assistant\n"


def _llama_base(messages: Sequence[Message]) -> str:
    """What the authors ask LLaMA-3.1-8B, a base model without a chat: one question, no system message."""
    return f"Question:\n{messages[-1][1]}\n{BOXED}\nAnswer:\nLet's think step by step."


def _plain(messages: Sequence[Message]) -> str:
    return "\n\n".join(content for _, content in messages)


@dataclass(frozen=True)
class Template:
    render: Callable[[Sequence[Message]], str]
    stops: tuple[str, ...] = ()  # tokens that end a response, besides the tokenizer's own


CHAT = "chat"  # the tokenizer's chat template
NAMED = {
    "qwen_math": Template(_chatml, ("<|im_end|>", "<|endoftext|>")),
    "llama_base": Template(_llama_base, ("<|end_of_text|>",)),
    "plain": Template(_plain),
}
TEMPLATES = (CHAT, *NAMED)


def conversation(
    earlier: Sequence[Message], prompt: str, instruction: str, keep_system: bool
) -> list[Message]:
    """What is said up to the question. An instruction is the system message in place of any other one, so
    that there is one preamble to read, not two."""
    if instruction or not keep_system:
        earlier = [message for message in earlier if message[0] != "system"]
    preamble = [("system", instruction)] if instruction else []
    return [*preamble, *earlier, ("user", prompt.strip())]


def render(template: str, messages: Sequence[Message], tokenizer: Any) -> str:
    """The text of a prompt. Raises ValueError for an unknown name, or chat where the tokenizer has none."""
    check(template, tokenizer)
    if template != CHAT:
        return NAMED[template].render(messages)
    turns = [{"role": role, "content": content} for role, content in messages]
    return str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def check(template: str, tokenizer: Any) -> None:
    """Raise ValueError where the tokenizer cannot be used with the template."""
    if template not in TEMPLATES:
        raise ValueError(f"template is {template!r}, expected one of {', '.join(TEMPLATES)}")
    if template == CHAT and not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; use an instruct model, or a "
            f"template by name: {', '.join(NAMED)}"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer {tokenizer.name_or_path!r} has no eos token, which ends a response")


def stop_tokens(template: str, tokenizer: Any) -> tuple[int, ...]:
    """Ids of the tokens that end a response: the tokenizer's eos first, then the template's that it knows."""
    vocabulary = tokenizer.get_vocab()
    named = NAMED[template].stops if template != CHAT else ()
    return tuple(
        dict.fromkeys([tokenizer.eos_token_id, *(vocabulary[stop] for stop in named if stop in vocabulary)])
    )
