"""Memory that tensors share one after another never belongs to two of them at once."""

from __future__ import annotations

import torch

from hpt_mega.checkpoint.scratch import Scratch


def test_tensors_that_live_together_never_share_memory_and_later_ones_do() -> None:
    scratch = Scratch()
    for round_ in range(3):
        first, second = (scratch.empty((size, 3), torch.bfloat16) for size in (5, 7))
        first.fill_(round_)
        second.fill_(-1)
        assert first.eq(round_).all()
        place = first.data_ptr()
        view = first[2:]
        del first
        assert scratch.empty((5, 3), torch.bfloat16).data_ptr() != place  # the view still lives there
        view.fill_(9)
        assert second.eq(-1).all()
        del view, second
    assert scratch.empty((5, 3), torch.bfloat16).data_ptr() == place


def test_an_empty_tensor_is_given_too() -> None:
    assert Scratch().empty((0, 3), torch.float32).shape == (0, 3)
