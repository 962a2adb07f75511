"""TokenBatch: the padded tensors a loss is computed from, checked once at construction.

What is done with them lives in the four parts and in estimator.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hpt_mega.trajectory import Source

_TOKEN_FIELDS = ("logp", "old_logp", "ref_logp", "rollout_logp", "advantage", "values", "entropy")
_SEQUENCE_FIELDS = ("reward", "weight")
_INDEX_FIELDS = ("group", "source", "pair")


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """B sequences of T tokens. Only logp and mask are always needed; a row names what else it lacks.

    Padding (mask False) of every [B, T] field is set to 0 at construction, so whatever it held (NaN, -inf)
    reaches neither a value nor a gradient. Floating fields are brought to logp's dtype, at least fp32.

    Raises ValueError, naming the field, for a wrong shape or dtype and for NaN or infinity under the mask.
    """

    logp: Tensor  # [B, T] log-probability of each token under the current policy, with gradient
    mask: Tensor  # [B, T] bool, the response tokens
    old_logp: Tensor | None = None  # [B, T] under the policy of before the step's updates, by the trainer
    reward: Tensor | None = None  # [B]
    group: Tensor | None = None  # [B] int, the question
    source: Tensor | None = None  # [B] int, 0 online or 1 offline; default: all online
    ref_logp: Tensor | None = None  # [B, T] under the frozen reference model (KL, DPO)
    rollout_logp: Tensor | None = None  # [B, T] as the rollout engine reported it
    advantage: Tensor | None = None  # [B, T] replaces the row's own advantage
    values: Tensor | None = None  # [B, T] value estimates before each token (GAE)
    pair: Tensor | None = None  # [B] int, every id exactly twice (DPO)
    weight: Tensor | None = None  # [B] alpha or beta; default: 1
    entropy: Tensor | None = None  # [B, T] of the current policy, with gradient (entropy bonus)
    question_tokens: Tensor | None = None  # [B] masked tokens of the question in the whole step

    def __post_init__(self) -> None:
        self._check_shapes()
        dtype = torch.promote_types(self.logp.dtype, torch.float32)
        for name in (*_TOKEN_FIELDS, *_SEQUENCE_FIELDS):
            if (value := getattr(self, name)) is not None:
                padded = value.to(dtype)
                self._set(name, torch.where(self.mask, padded, 0.0) if name in _TOKEN_FIELDS else padded)
        self._check_finite()
        if self.source is None:
            self._set("source", torch.full(self.mask.shape[:1], Source.ONLINE.value, device=self.mask.device))
        if self.weight is None:
            self._set("weight", self.lengths.new_ones(len(self)))

    def __len__(self) -> int:
        return self.mask.shape[0]

    def require(self, name: str, why: str) -> Tensor:
        """The field, or a ValueError that says what needs it."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise ValueError(f"{why} needs TokenBatch.{name}, which was not given")
        return value

    @property
    def lengths(self) -> Tensor:
        """[B] masked tokens of each sequence, in logp's dtype."""
        return self.mask.sum(1).to(self.logp.dtype)

    @property
    def offline(self) -> Tensor:
        """[B] bool, the demonstrations."""
        return self.require("source", "the split by source") == Source.OFFLINE

    def _check_shapes(self) -> None:
        if self.logp.dim() != 2 or not self.logp.is_floating_point():
            raise ValueError(f"TokenBatch.logp must be floating [B, T]; got {_say(self.logp)}")
        if self.mask.shape != self.logp.shape or self.mask.dtype != torch.bool:
            raise ValueError(f"TokenBatch.mask must be bool {list(self.logp.shape)}; got {_say(self.mask)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None or field.name in ("logp", "mask"):
                continue
            shape = self.logp.shape if field.name in _TOKEN_FIELDS else self.logp.shape[:1]
            if value.shape != shape:
                raise ValueError(f"TokenBatch.{field.name} must be {list(shape)}; got {_say(value)}")
            if field.name in _INDEX_FIELDS and (value.is_floating_point() or value.dtype == torch.bool):
                raise ValueError(f"TokenBatch.{field.name} must hold integers; got {_say(value)}")

    def _check_finite(self) -> None:
        names = [name for name in (*_TOKEN_FIELDS, *_SEQUENCE_FIELDS) if getattr(self, name) is not None]
        finite = torch.stack([getattr(self, name).detach().isfinite().all() for name in names])
        for name, ok in zip(names, finite.tolist(), strict=True):  # one device-to-host copy for all fields
            if not ok:
                raise ValueError(
                    f"TokenBatch.{name} holds NaN or infinity; expected finite numbers wherever mask is True"
                )

    def _set(self, name: str, value: Tensor) -> None:
        object.__setattr__(self, name, value)  # the class is frozen once constructed


def _say(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)}"
