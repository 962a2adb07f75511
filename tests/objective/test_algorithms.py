"""Every row of the table against the published loss of its paper (published.py), and its options."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpt_mega.objective import algorithm, rows
from tests.objective.published import (
    GROUPS,
    PUBLISHED,
    T,
    case_for,
    difference,
    dr_average,
    gae_advantage,
    grpo,
    grpo_advantage,
    joint,
    make_case,
    ppo_clip,
    sequence_average,
    token_average,
)

TOLERANCE = 1e-10
torch.set_num_threads(1)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_gradient_equals_that_of_the_published_loss(name: str, seed: int) -> None:
    off_by, size = difference(name, seed)
    assert off_by <= TOLERANCE
    assert size > 1e-4


def test_the_table_is_what_is_tested() -> None:
    assert [row.name for row in rows()] == list(PUBLISHED)
    assert all(row.formula and row.paper for row in rows())


def test_the_random_batches_reach_every_branch_of_the_clip() -> None:
    case = make_case(0)
    mask = case.fields["mask"]
    ratio = (case.logp - case.fields["old_logp"])[mask].exp()
    advantage = torch.cat([torch.full((int(mask[i].sum()),), grpo_advantage(case, i)) for i in case.indices])
    for active in (ratio > 1.2, ratio < 0.8, (ratio > 0.8) & (ratio < 1.2)):
        assert (active & (advantage > 0)).any() and (active & (advantage < 0)).any()
    assert (advantage == 0).any()


@pytest.mark.parametrize("kl_form", ["k1", "k2", "k3"])
def test_kl_in_the_loss_equals_its_formula(kl_form: str) -> None:
    case = make_case(5)

    def kl(i: int) -> Tensor:
        delta = case.sequence(i, "ref_logp") - case.sequence(i, "logp")
        return {"k1": -delta, "k2": delta**2 / 2, "k3": torch.expm1(delta) - delta}[kl_form]

    ours = case.gradient(algorithm("grpo", kl_coef=0.3, kl_form=kl_form)(case.batch()).loss)
    theirs = case.gradient(grpo(case) + 0.3 * sequence_average(case, kl))
    assert (ours - theirs)[case.fields["mask"]].abs().max() <= TOLERANCE


def test_dual_clip_equals_its_formula() -> None:
    case = make_case(6)
    case.fields["old_logp"] = case.fields["old_logp"] - 0.9  # ratios on both sides of the dual clip

    def per_token(i: int) -> Tensor:
        advantage = grpo_advantage(case, i)
        clipped = -ppo_clip(case, i, advantage)
        return -(torch.maximum(clipped, torch.tensor(2.5 * advantage)) if advantage < 0 else clipped)

    ours = case.gradient(algorithm("grpo", stabilizer="dual_clip", clip_dual=2.5)(case.batch()).loss)
    theirs = case.gradient(sequence_average(case, per_token))
    assert (ours - theirs)[case.fields["mask"]].abs().max() <= TOLERANCE


def test_entropy_bonus_is_subtracted_with_its_own_gradient() -> None:
    case = make_case(7)
    entropy = torch.rand(len(GROUPS), T, dtype=torch.float64).requires_grad_()
    case.fields["entropy"] = entropy
    loss = algorithm("dapo", entropy_coef=0.01)(case.batch()).loss
    expected = -0.01 * case.fields["mask"].double() / case.tokens
    torch.testing.assert_close(torch.autograd.grad(loss, entropy)[0], expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("power", [0.5, 1.7])
def test_power_shaping_takes_the_gradient_of_the_power(power: float) -> None:
    case = case_for("luffy", 8)
    ours = case.gradient(
        algorithm("luffy", offline_likelihood="power", shaping_power=power)(case.batch()).loss
    )
    theirs = case.gradient(joint(case, lambda prob, advantage: -(prob**power) * advantage))
    assert (ours - theirs)[case.fields["mask"]].abs().max() <= TOLERANCE


def test_question_mean_averages_questions_and_not_sequences() -> None:
    case = make_case(9)

    def question(group: int) -> Tensor:
        members = [i for i in case.indices if GROUPS[i] == group]
        return torch.cat([ppo_clip(case, i, grpo_advantage(case, i)) for i in members]).mean()

    out = algorithm("grpo", aggregation="question_mean")(case.batch())
    theirs = case.gradient(torch.stack([question(g) for g in set(GROUPS)]).mean())
    assert out.denominator == pytest.approx(len(set(GROUPS)))
    assert (case.gradient(out.loss) - theirs)[case.fields["mask"]].abs().max() <= TOLERANCE


def test_a_row_with_swapped_parts_is_the_other_row() -> None:
    case = make_case(10)
    swapped = algorithm("grpo", stabilizer="cis_mask", aggregation="token_mean", clip_low=0.3)(case.batch())
    cispo_out = algorithm("cispo", clip_low=0.3)(case.batch())
    assert torch.equal(swapped.token_weight, cispo_out.token_weight)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("gprp",), {}),
        (("grpo",), {"clip_hgih": 0.3}),
        (("grpo",), {"stabilizer": "clop"}),
        (("grpo",), {"stabilizer": "clip+clop"}),
        (("grpo",), {"offline_reference": "one"}),
        (("grpo",), {"aggregation": "mean"}),
        (("grpo",), {"kl_form": "k4"}),
    ],
)  # fmt: skip
def test_an_unknown_name_lists_the_known_ones(arguments: tuple[str], options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"known: .*, "):
        algorithm(*arguments, **options)


@pytest.mark.parametrize("value", [-0.1, float("nan"), "0.2", True])
def test_an_option_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"clip_low.*at least 0"):
        algorithm("grpo", clip_low=value)


def sequence_kl(case: Any, i: int, form: str) -> Tensor:
    """KL of each token, of the policy that sampled, by the formula of its form."""
    delta = case.sequence(i, "ref_logp") - case.sequence(i, "old_logp")
    return {"k1": -delta, "k2": delta**2 / 2, "k3": torch.expm1(delta) - delta}[form]


@pytest.mark.parametrize("kl_form", ["k1", "k2", "k3"])
def test_kl_in_the_reward_is_subtracted_before_the_advantage(kl_form: str) -> None:
    case = make_case(11)
    rewards = [
        case.number(i, "reward") - 0.3 * float(sequence_kl(case, i, kl_form).sum()) for i in case.indices
    ]

    def per_token(i: int) -> Tensor:
        mates = [rewards[j] for j in case.indices if GROUPS[j] == GROUPS[i]]
        return ppo_clip(case, i, rewards[i] - statistics.mean(mates))

    estimator = algorithm("dr_grpo", kl_coef=0.3, kl_form=kl_form, kl_in="reward")
    theirs = case.gradient(dr_average(case, per_token, length=T))
    mask = case.fields["mask"]
    assert (case.gradient(estimator(case.batch()).loss) - theirs)[mask].abs().max() <= TOLERANCE
    batch = case.batch()
    kl = estimator.kl_penalty(batch).sum(1)
    early = estimator.advantages(case.fields["reward"], case.fields["group"], kl=kl)
    case.fields["advantage"] = early[:, None].expand(-1, T)
    assert (case.gradient(estimator(case.batch()).loss) - theirs)[mask].abs().max() <= TOLERANCE
    with pytest.raises(ValueError, match="needs kl"):
        estimator.advantages(case.fields["reward"], case.fields["group"])


def test_ppo_takes_the_kl_of_each_token_from_its_own_reward() -> None:
    case = make_case(12)
    options = {"gae_gamma": 0.9, "gae_lambda": 0.8, "kl_coef": 0.3, "kl_form": "k1", "kl_in": "reward"}
    ours = case.gradient(algorithm("ppo", **options)(case.batch()).loss)
    theirs = case.gradient(
        token_average(
            case, lambda i: ppo_clip(case, i, gae_advantage(case, i, 0.3 * sequence_kl(case, i, "k1")))
        )
    )
    assert (ours - theirs)[case.fields["mask"]].abs().max() <= TOLERANCE


def test_kl_in_the_reward_without_a_reference_model_says_so() -> None:
    case = make_case(13)
    del case.fields["ref_logp"]
    with pytest.raises(ValueError, match=r"kl_in 'reward' needs TokenBatch\.ref_logp"):
        algorithm("grpo", kl_coef=0.1, kl_in="reward")(case.batch())


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"shaping_gamma": 0.3}, lambda p: p / (p + 0.3)),
        ({"shaping_gamma": 0.5}, lambda p: p / (p + 0.5)),
        ({"offline_likelihood": "square_root"}, torch.sqrt),
        ({"offline_likelihood": "log"}, torch.log),
    ],
)
def test_the_authors_other_shapings_have_their_formula(options: dict[str, Any], shape: Any) -> None:
    case = case_for("luffy", 14)
    ours = case.gradient(algorithm("luffy", **options)(case.batch()).loss)
    theirs = case.gradient(joint(case, lambda prob, advantage: -shape(prob) * advantage))
    assert (ours - theirs)[case.fields["mask"]].abs().max() <= TOLERANCE


def test_a_sequence_clip_masks_by_the_sequence_ratio_under_token_ratios() -> None:
    case = make_case(15)

    def per_token(i: int) -> Tensor:
        ratio = torch.exp(case.sequence(i, "logp") - case.sequence(i, "old_logp"))
        s, advantage = float(ratio.detach().log().mean().exp()), grpo_advantage(case, i)
        clipped = (advantage > 0 and s > 1.1) or (advantage < 0 and s < 0.95)
        return -ratio * advantage * (0.0 if clipped else 1.0)

    options = {"stabilizer": "sequence_clip", "clip_low": 0.05, "clip_high": 0.1}
    out = algorithm("grpo", **options)(case.batch())
    theirs = case.gradient(sequence_average(case, per_token))
    assert 0 < out.metrics["masked_fraction"] < 1
    assert (case.gradient(out.loss) - theirs)[case.fields["mask"]].abs().max() <= TOLERANCE


def test_srft_imitates_a_demonstration_whose_advantage_is_zero() -> None:
    assert algorithm("srft_entropy").trains_on(0.0)
    assert not algorithm("srft").trains_on(0.0)
