"""The dynamic loss scale of fp16: one for all parts of an optimizer, moved once a step.

megatron-core gives each part (dense weights, experts) a scale of its own, which overflows of its own
gradients move, and scales the loss by the first part's: after an overflow of an expert alone, gradients would
be wrong.
"""

from __future__ import annotations

from typing import Any

import torch

from hpt_mega.megatron import cpu

cpu.install()

from megatron.core.optimizer import MegatronOptimizer  # noqa: E402
from megatron.core.optimizer.grad_scaler import DynamicGradScaler, MegatronGradScaler  # noqa: E402


class LossScale(MegatronGradScaler):
    """megatron-core's dynamic scale, behind the one that several parts share."""

    def __init__(self, dynamic: DynamicGradScaler) -> None:
        self._dynamic = dynamic

    @property
    def scale(self) -> torch.Tensor:
        return self._dynamic.scale

    @property
    def inv_scale(self) -> torch.Tensor:
        return self._dynamic.inv_scale

    def update(self, found_inf: bool) -> None:
        """Called by each part with what it has found; `settle` follows with what all of them have."""

    def settle(self, overflow: bool) -> None:
        """Move the scale after a step. Raises FloatingPointError where it cannot go lower."""
        if overflow and self.scale <= self._dynamic.min_scale:
            raise FloatingPointError(
                f"a gradient is not finite at a loss scale of {float(self.scale)}, the lowest; lower "
                "optimizer.lr, inspect the batch, or set precision=bf16"
            )
        self._dynamic.update(overflow)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._dynamic.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._dynamic.load_state_dict(state_dict)


def share_scale(optimizer: MegatronOptimizer) -> None:
    """Give all parts of an fp16 optimizer the first one's scale."""
    parts = optimizer.chained_optimizers
    scale = LossScale(parts[0].grad_scaler)
    for part in parts:
        part.grad_scaler = scale


def loss_scale(optimizer: MegatronOptimizer) -> LossScale | None:
    """What share_scale has put in; None without fp16."""
    scale = getattr(optimizer.chained_optimizers[0], "grad_scaler", None)
    return scale if isinstance(scale, LossScale) else None
