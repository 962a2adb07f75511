"""The texts by which servers are probed after every update."""

from __future__ import annotations

from hpt_mega.trajectory import Question
from hpt_mega.worker import _probe_texts


def question(prompt: int, demonstration: int) -> Question:
    return Question("", "", "", "", "", tuple(range(prompt)), tuple(range(100, 100 + demonstration)))


def test_a_probe_leaves_a_server_room_for_one_token_and_has_prompt_and_response() -> None:
    asked = [question(5, 9), question(5, 2), question(1, 0), question(6, 0), question(1, 3)]
    found = [(text.prompt_tokens, text.response_tokens) for text in _probe_texts(asked, longest=4)]
    assert found == [
        ((0, 1, 2, 3, 4), (100, 101, 102)),
        ((0, 1, 2, 3, 4), (100, 101)),
        ((0, 1, 2), (3, 4, 5)),  # the prompt of one token, which has no demonstration, gives none
        ((0,), (100, 101, 102)),
    ]
