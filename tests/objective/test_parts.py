"""The parts on their own: laws of the group advantages, and the trainer/engine corrections by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpt_mega.objective import TokenBatch, algorithm

rewards = st.lists(st.sampled_from([0.0, 0.1, 0.25, 1.0, -1.0]), min_size=1, max_size=12)


def grouped(name: str, values: list[float], source: Tensor | None = None) -> tuple[Tensor, Tensor]:
    reward = torch.tensor(values, dtype=torch.float64)
    group = torch.arange(len(values)) % 3 * 10
    return algorithm(name).advantages(reward, group, source), group


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "hpt"])
@given(values=rewards)
@settings(max_examples=40)
def test_advantages_of_a_group_sum_to_zero(name: str, values: list[float]) -> None:
    advantage, group = grouped(name, values)
    for g in group.unique():
        assert abs(advantage[group == g].sum()) < 1e-9


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "reinforce_pp"])
@given(values=rewards, shift=st.floats(-3, 3))
@settings(max_examples=40)
def test_advantages_do_not_depend_on_a_shift_of_the_rewards(
    name: str, values: list[float], shift: float
) -> None:
    shifted = [value + shift for value in values]
    if len(set(shifted)) == len(set(values)):
        torch.testing.assert_close(grouped(name, values)[0], grouped(name, shifted)[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo", "maxrl", "reinforce_pp", "luffy", "srft"])
@given(value=st.floats(-5, 5), size=st.integers(1, 9))
@settings(max_examples=40)
def test_equal_rewards_teach_exactly_nothing(name: str, value: float, size: int) -> None:
    group = torch.zeros(size, dtype=torch.long)
    for dtype in (torch.float32, torch.float64):
        advantage = algorithm(name, std_eps=0.0).advantages(torch.full((size,), value, dtype=dtype), group)
        assert (advantage == 0).all()


def test_maxrl_divides_by_the_pass_rate_and_never_by_less_than_zero() -> None:
    reward = torch.tensor([1.0, 0.0, 0.0, 0.0, -1.0, 0.0], dtype=torch.float64)
    found = algorithm("maxrl").advantages(reward, torch.tensor([3, 3, 3, 3, 5, 5]))
    assert found.tolist() == [3, -1, -1, -1, 0, 0]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_maxrl_expects_the_gradient_of_log_p_but_for_what_its_samples_miss(n: int) -> None:
    """E[mean of A ∇log π] = (1 - (1 - P)^(n - 1)) ∇log P, here over all n-tuples of three answers."""
    policy = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)  # the first is right
    scores = torch.eye(3, dtype=torch.float64) - policy  # ∇log π of each answer, by its logits
    drawn_GN = torch.cartesian_prod(*[torch.arange(3)] * n)
    group = torch.arange(len(drawn_GN)).repeat_interleave(n)
    advantage = algorithm("maxrl").advantages((drawn_GN.flatten() == 0).double(), group)
    estimate_G3 = (advantage.view(-1, n, 1) * scores[drawn_GN]).mean(1)
    expected = (policy[drawn_GN].prod(1)[:, None] * estimate_G3).sum(0)
    torch.testing.assert_close(expected, (1 - (1 - policy[0]) ** (n - 1)) * scores[0])


def test_hpt_leaves_demonstrations_out_of_the_group_and_luffy_takes_them_in() -> None:
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    group, source = torch.tensor([7, 7, 7, 7, 8]), torch.tensor([0, 0, 0, 1, 1])
    hpt = algorithm("hpt").advantages(reward, group, source)
    torch.testing.assert_close(hpt, torch.tensor([2 / 3, -1 / 3, -1 / 3, 1, 1], dtype=torch.float64))
    luffy = algorithm("luffy", std_eps=0.0).advantages(reward, group, source)
    half = 0.5 / math.sqrt(1 / 3)
    torch.testing.assert_close(luffy, torch.tensor([half, -half, -half, half, 0], dtype=torch.float64))


def test_the_sign_advantage_is_plus_or_minus_one() -> None:
    advantage = algorithm("reinforce", advantage="sign").advantages(
        torch.tensor([1, 0, 1]), torch.tensor([0, 0, 0])
    )
    assert advantage.tolist() == [1, -1, 1]


def test_nan_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match="reward holds NaN"):
        algorithm("grpo").advantages(torch.tensor([float("nan"), 1.0]), torch.tensor([0, 0]))


@pytest.mark.parametrize("pair", [[0, 0, 1, 2], [0, 0, 0, 1]])
def test_a_torn_pair_is_an_error(pair: list[int]) -> None:
    with pytest.raises(ValueError, match="must occur exactly twice"):
        algorithm("dpo")(preference_batch(pair, [0.0, 1.0, 0.0, 1.0]))


def test_a_pair_without_a_better_one_is_an_error() -> None:
    with pytest.raises(ValueError, match="reward ties within the pair of sequence 2"):
        algorithm("dpo")(preference_batch([0, 0, 1, 1], [0.0, 1.0, 0.5, 0.5]))


def preference_batch(pair: list[int], reward: list[float]) -> TokenBatch:
    logp = -torch.ones(4, 2)
    return TokenBatch(
        logp=logp, ref_logp=logp, mask=logp < 0, pair=torch.tensor(pair), reward=torch.tensor(reward)
    )


# log(π_old / π_engine) of two sequences; the second has one token only.
GAP = [[math.log(3.0), math.log(0.9)], [math.log(0.4), 0.0]]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("truncated_token", [[2.0, 0.9], [0.4, 0.0]]),
        ("masked_token", [[0.0, 0.9], [0.0, 0.0]]),
        ("truncated_sequence", [[2.0, 2.0], [0.4, 0.0]]),
        ("masked_sequence", [[0.0, 0.0], [0.0, 0.0]]),
        ("truncated_geometric", [[2.7**0.5, 2.7**0.5], [0.4, 0.0]]),
        ("masked_geometric", [[2.7**0.5, 2.7**0.5], [0.0, 0.0]]),
        ("reject_token", [[0.0, 1.0], [0.0, 0.0]]),
        ("reject_sequence", [[0.0, 0.0], [0.0, 0.0]]),
        ("reject_geometric", [[1.0, 1.0], [0.0, 0.0]]),
        ("truncated_token+reject_geometric", [[2.0, 0.9], [0.0, 0.0]]),
    ],
)
def test_engine_corrections_by_hand(name: str, expected: list[list[float]]) -> None:
    old_logp = torch.full((2, 2), -1.0, dtype=torch.float64)
    batch = TokenBatch(
        logp=old_logp,
        old_logp=old_logp,
        rollout_logp=old_logp - torch.tensor(GAP, dtype=torch.float64),
        mask=torch.tensor([[True, True], [True, False]]),
        advantage=torch.ones(2, 2),
    )
    out = algorithm("dapo", stabilizer=f"clip+{name}")(batch)
    torch.testing.assert_close(-out.token_weight, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_a_demonstration_which_no_engine_wrote_is_not_corrected(level: str) -> None:
    old_logp = torch.full((2, 2), -1.0, dtype=torch.float64)
    batch = TokenBatch(
        logp=old_logp,
        old_logp=old_logp,
        rollout_logp=torch.tensor([[-2.0, -2.0], [0.0, 0.0]], dtype=torch.float64),
        mask=old_logp < 0,
        reward=torch.ones(2),
        source=torch.tensor([0, 1]),
    )
    out = algorithm("rft", stabilizer=f"truncated_{level}", aggregation="token_mean")(batch)
    torch.testing.assert_close(-out.token_weight, torch.tensor([[2.0, 2.0], [1.0, 1.0]], dtype=torch.float64))


def test_a_correction_without_the_engines_log_probabilities_says_so() -> None:
    batch = preference_batch([0, 0, 1, 1], [0.0, 1.0, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"trainer/engine gap needs TokenBatch\.old_logp"):
        algorithm("reinforce", stabilizer="truncated_token")(batch)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_engine_gaps_of_any_size_leave_the_gradient_finite(level: str) -> None:
    logp = torch.full((2, 3), -1.0)
    for gap in (1e4, -1e4):
        batch = TokenBatch(
            logp=logp, old_logp=logp, rollout_logp=logp + gap, mask=logp < 0, advantage=torch.ones(2, 3)
        )
        for rule in ("truncated", "masked", "reject"):
            out = algorithm("dapo", stabilizer=f"clip+{rule}_{level}")(batch)
            assert out.token_weight.isfinite().all() and out.loss.isfinite()


def test_rejection_has_an_interval_of_its_own() -> None:
    logp = torch.full((1, 2), -1.0)
    batch = TokenBatch(
        logp=logp, old_logp=logp, rollout_logp=logp - 0.1, mask=logp < 0, advantage=torch.ones(1, 2)
    )
    kept = algorithm("dapo", stabilizer="masked_token+reject_geometric")(batch)
    dropped = algorithm("dapo", stabilizer="masked_token+reject_geometric", reject_high=1.001)(batch)
    assert (kept.token_weight != 0).all() and (dropped.token_weight == 0).all()


def test_luffy_without_a_standard_deviation_centres_on_the_joint_group() -> None:
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    group, source = torch.zeros(4, dtype=torch.long), torch.tensor([0, 0, 0, 1])
    joint = {"advantage": "joint_group_mean", "offline_advantage": "joint_group_mean"}
    assert algorithm("luffy", **joint).advantages(reward, group, source).tolist() == [0.5, -0.5, -0.5, 0.5]
