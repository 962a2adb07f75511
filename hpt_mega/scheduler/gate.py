"""HPT's gates: the weights (alpha, beta) of a question's RL and SFT losses, from its pass rate.

Which trajectories follow from them is blend.py's matter.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Weights = tuple[Tensor, Tensor]


def switch(pass_rate: Tensor, *, threshold: float = 0.0) -> Weights:
    """(1, 0) where P > threshold, else (0, 1): the paper's gate (arXiv 2509.04419, section 3.2).

    threshold 1 sends every question to SFT, -1 none.
    """
    solved = (pass_rate > threshold).to(pass_rate.dtype)
    return solved, 1 - solved


def three_zone(pass_rate: Tensor, *, switch_gate: float = 0.0, switch_gate_off: float = 0.0) -> Weights:
    """(0, 1) where P <= switch_gate, (1, 1) where P <= switch_gate_off, else (1, 0).

    The authors' code has three zones: SFT, off-policy RL on the demonstration, RL. In the middle one both
    weights are 1 here: the demonstration joins the group of rollouts, and a row with an off-policy half
    (luffy, srft) takes its advantage from that joint group. (The authors drop the rollouts there.)
    """
    if switch_gate_off < switch_gate:
        raise ValueError(
            f"three_zone needs switch_gate <= switch_gate_off; got {switch_gate} and {switch_gate_off}"
        )
    sft_only = pass_rate <= switch_gate
    with_demonstration = pass_rate <= switch_gate_off
    return (~sft_only).to(pass_rate.dtype), with_demonstration.to(pass_rate.dtype)


def soft(pass_rate: Tensor, *, threshold: float = 0.0) -> Weights:
    """(1, 1) where P <= threshold, else (1, 0): every rollout stays, the demonstration is added."""
    return torch.ones_like(pass_rate), (pass_rate <= threshold).to(pass_rate.dtype)


def linear(pass_rate: Tensor) -> Weights:
    """(P, 1 - P)."""
    return pass_rate, 1 - pass_rate


def sigmoid(pass_rate: Tensor, *, center: float = 0.5, temperature: float = 0.1) -> Weights:
    """(s, 1 - s) with s = sigmoid((P - center) / temperature): a switch without the jump."""
    if not temperature > 0:
        raise ValueError(f"sigmoid needs a temperature above 0; got {temperature}")
    alpha = torch.sigmoid((pass_rate - center) / temperature)
    return alpha, 1 - alpha


def inverse_mse(pass_rate: Tensor, *, balance: float = 0.125) -> Weights:
    """(1 - b, b) with b = balance² / (balance² + P²): a gradient weighs by the inverse of its squared error.

    Measured question by question (bench/gate_mse.py), the error of the RL gradient relative to its size grows
    as P falls, that of the demonstration's shrinks; at P = balance they are equal.
    """
    if not balance > 0:
        raise ValueError(f"inverse_mse needs a balance above 0; got {balance}")
    beta = balance**2 / (balance**2 + pass_rate**2)
    return 1 - beta, beta


GATES: dict[str, Callable[..., Weights]] = {
    "switch": switch,
    "three_zone": three_zone,
    "linear": linear,
    "sigmoid": sigmoid,
    "soft": soft,
    "inverse_mse": inverse_mse,
}


THRESHOLDS = ("threshold", "switch_gate", "switch_gate_off")  # compared with pass rates


@dataclass(frozen=True)
class Gate:
    """A gate with its options, callable on pass rates."""

    name: str
    options: dict[str, float]

    def __call__(self, pass_rate: Tensor) -> Weights:
        """(alpha [Q], beta [Q]) in [0, 1] from pass_rate [Q] in [0, 1].

        Raises ValueError for a pass rate outside [0, 1] or NaN.
        """
        pass_rate = pass_rate.to(torch.promote_types(pass_rate.dtype, torch.float32))
        if not bool(((pass_rate >= 0) & (pass_rate <= 1)).all()):
            raise ValueError(f"pass rates must lie in [0, 1]; got {pass_rate.tolist()}")
        return GATES[self.name](pass_rate, **self.options)

    def at_every_rate(self, rollouts: int) -> Weights:
        """The weights at each mean that so many rewards of 0 and 1 can have."""
        return self(torch.linspace(0, 1, max(rollouts, 1) + 1, dtype=torch.float64))


def gate(name: str, **options: Any) -> Gate:
    """A gate by its name, with options by their name; numbers are in units of the pass rate.

    Raises ValueError for an unknown gate or option, listing the known ones, and for options that do not fit.
    """
    if name not in GATES:
        raise ValueError(f"unknown gate {name!r}; known: {', '.join(GATES)}")
    parameters = [
        p.name for p in inspect.signature(GATES[name]).parameters.values() if p.kind == p.KEYWORD_ONLY
    ]
    for key, value in options.items():
        if key not in parameters:
            known = ", ".join(parameters) or "none"
            raise ValueError(f"unknown option {key!r} of gate '{name}'; known: {known}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"option {key} of gate '{name}' must be a finite number; got {value!r}")
        if key in THRESHOLDS and value > 1:
            raise ValueError(
                f"option {key} of gate '{name}' is a pass rate, expected 1 or below; got {value}"
            )
    made = Gate(name, options)
    made(torch.zeros(1))  # options that do not fit together fail here, not in the first step
    return made
