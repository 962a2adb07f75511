"""What PPO adds to the four parts: advantages and returns from a value model, and that model's own loss.

Token advantages enter the estimator through advantage.py; the value model lives in megatron/.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    reward: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float, kl_penalty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [B, T] and 0 outside the mask (arXiv 1506.02438).

    A_t = sum_k (gamma lam)^k delta_{t+k} with delta_t = r_t + gamma V_{t+1} - V_t, over masked tokens only;
    returns are A + V. reward [B] arrives at the last masked token, where the episode ends; kl_penalty [B, T]
    is subtracted from the reward of its token; values [B, T] are the estimates before each token.

    Raises ValueError, naming the argument, for NaN or infinity under the mask.
    """
    _check(mask, reward=reward, values=values, kl_penalty=kl_penalty)
    values = torch.where(mask, values.detach(), 0.0)
    cost = torch.zeros_like(values) if kl_penalty is None else torch.where(mask, kl_penalty.detach(), 0.0)
    pending = reward.to(values.dtype).clone()
    advantage = torch.zeros_like(values)
    running, next_value = torch.zeros_like(pending), torch.zeros_like(pending)
    for t in reversed(range(values.shape[1])):
        here = mask[:, t]
        delta = pending - cost[:, t] + gamma * next_value - values[:, t]
        running = torch.where(here, delta + gamma * lam * running, running)
        next_value = torch.where(here, values[:, t], next_value)
        pending = torch.where(here, 0.0, pending)
        advantage[:, t] = running
    advantage = advantage * mask
    return advantage, advantage + values


def value_loss(
    values_BT: Tensor, old_values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor, clip: float
) -> Tensor:
    """Sum over masked tokens of max((V - R)², (V_clipped - R)²) / 2, 0-d (PPO2, OpenAI baselines).

    V_clipped = V_old + clamp(V - V_old, -clip, clip). Divide by the step's number of masked tokens.
    Raises ValueError, naming the argument, for NaN or infinity under the mask.
    """
    _check(mask_BT, values_BT=values_BT, old_values_BT=old_values_BT, returns_BT=returns_BT)
    values = torch.where(mask_BT, values_BT, 0.0)
    old = torch.where(mask_BT, old_values_BT, 0.0).detach()
    returns = torch.where(mask_BT, returns_BT, 0.0).detach()
    clipped = old + (values - old).clamp(-clip, clip)
    worse = torch.maximum((values - returns).square(), (clipped - returns).square())
    return (worse * mask_BT).sum() / 2


def _check(mask: Tensor, **arguments: Tensor | None) -> None:
    for name, value in arguments.items():
        if value is None:
            continue
        inside = value.detach() if value.dim() == 1 else value.detach()[mask]
        if not bool(inside.isfinite().all()):
            raise ValueError(f"{name} holds NaN or infinity; expected finite numbers wherever mask is True")
