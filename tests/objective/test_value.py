"""The value model's loss against PPO2's formula, and advantages against a sum written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpt_mega.objective.value import gae, value_loss

B, T = 5, 7
torch.set_num_threads(1)


def grids(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, old values, returns and a mask with holes and an empty row."""
    generator = torch.Generator().manual_seed(seed)
    values, old, returns = (torch.randn(B, T, dtype=torch.float64, generator=generator) for _ in range(3))
    mask = torch.rand(B, T, generator=generator) < 0.6
    mask[2] = False
    return values, old, returns, mask


@settings(max_examples=30)
@given(seed=st.integers(0, 9999), clip=st.sampled_from([0.0, 0.2, 5.0]))
def test_value_loss_and_its_gradient_are_those_of_ppo2(seed: int, clip: float) -> None:
    values, old, returns, mask = grids(seed)
    values.requires_grad_()
    expected = torch.zeros((), dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        v = values[b, t]
        clipped = old[b, t] + torch.clamp(v - old[b, t], -clip, clip)
        expected = expected + 0.5 * torch.max((v - returns[b, t]) ** 2, (clipped - returns[b, t]) ** 2)
    noisy = [torch.where(mask, x, float("nan")) for x in (values, old, returns)]
    loss = value_loss(*noisy, mask, clip)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    ours, theirs = (torch.autograd.grad(x, values)[0] for x in (loss, expected))
    assert (ours - theirs).abs().max() <= 1e-12


@settings(max_examples=30)
@given(
    seed=st.integers(0, 9999), gamma=st.sampled_from([0.0, 0.9, 1.0]), lam=st.sampled_from([0.0, 0.7, 1.0])
)
def test_gae_is_the_discounted_sum_of_the_errors(seed: int, gamma: float, lam: float) -> None:
    values, cost, _, mask = grids(seed)
    reward = torch.arange(B, dtype=torch.float64)
    advantages, returns = gae(reward, torch.where(mask, values, float("nan")), mask, gamma, lam, cost)
    for b in range(B):
        where = mask[b].nonzero()[:, 0].tolist()
        after = [*values[b, where[1:]].tolist(), 0.0] if where else []
        delta = [gamma * after[i] - float(values[b, t] + cost[b, t]) for i, t in enumerate(where)]
        if where:
            delta[-1] += b
        for i, t in enumerate(where):
            expected = sum((gamma * lam) ** (k - i) * delta[k] for k in range(i, len(where)))
            assert advantages[b, t].item() == pytest.approx(expected, abs=1e-12)
            assert returns[b, t].item() == pytest.approx(expected + float(values[b, t]), abs=1e-12)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_with_lambda_one_and_gamma_one_the_returns_are_the_reward_still_to_come() -> None:
    values, _, _, mask = grids(1)
    reward = torch.arange(B, dtype=torch.float64)
    _, returns = gae(reward, values, mask, 1.0, 1.0)
    torch.testing.assert_close(returns, reward[:, None] * mask)


@pytest.mark.parametrize("name", ["values", "reward", "kl_penalty"])
def test_nan_names_the_argument_of_gae(name: str) -> None:
    values, cost, _, mask = grids(2)
    given_ = {"reward": torch.ones(B), "values": values, "kl_penalty": cost}
    given_[name][mask.any(1) if name == "reward" else mask] = float("nan")
    with pytest.raises(ValueError, match=f"{name} holds NaN"):
        gae(mask=mask, gamma=1.0, lam=1.0, **given_)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_nan_names_the_argument_of_the_value_loss(index: int) -> None:
    *fields, mask = grids(3)
    fields[index][mask] = float("nan")
    with pytest.raises(ValueError, match=["values_BT", "old_values_BT", "returns_BT"][index]):
        value_loss(*fields, mask, 0.2)
