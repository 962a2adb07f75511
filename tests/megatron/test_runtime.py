"""What trainer.deterministic asks of the libraries that a GPU computes with."""

from __future__ import annotations

import os

import pytest
import torch

from hpt_mega.megatron.runtime import repeat_exactly


def test_repeating_exactly_reaches_every_library_and_keeps_what_the_environment_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "environ", {"NCCL_ALGO": "^NVLS"})
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    repeat_exactly()
    assert asked == [True]
    assert os.environ == {
        "NCCL_ALGO": "^NVLS",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
    }
