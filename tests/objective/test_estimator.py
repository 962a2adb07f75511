"""Laws of the estimator: what a loss must not depend on, and what no input may break."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpt_mega.objective import Estimator, TokenBatch, algorithm, rows
from hpt_mega.objective.metrics import added, means

B, T = 12, 5
NAMES = [row.name for row in rows()]
TAKES_OFFLINE = [row.name for row in rows() if row.offline or row.any_source]
AGGREGATIONS = ["token_mean", "sequence_mean", "constant", "question_mean"]


def tensors(seed: int, name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """All fields of a batch with everything in it: six pairs (i, i + 6), groups of sizes 5, 4, 2, 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, dtype=dtype, generator=generator)

    logp = -normal(B, T).abs()
    mask = torch.rand(B, T, generator=generator) < 0.7
    mask[:, 0] = True
    source = torch.zeros(B, dtype=torch.long)
    if name in TAKES_OFFLINE:
        source[torch.tensor([0, 6, 8])] = 1
    return {
        "logp": logp,
        "mask": mask,
        "old_logp": logp + 0.3 * normal(B, T),
        "ref_logp": logp + 0.3 * normal(B, T),
        "rollout_logp": logp + 0.3 * normal(B, T),
        "values": normal(B, T),
        "entropy": normal(B, T).abs(),
        "reward": torch.rand(B, dtype=dtype, generator=generator),
        "group": torch.tensor([3, 3, 3, 3, 3, 0, 0, 0, 0, 5, 5, 9]),
        "source": source,
        "pair": torch.arange(B) % 6,
        "weight": torch.rand(B, dtype=dtype, generator=generator),
    }


def weight_of(estimator: Estimator, batch: dict[str, Tensor], denominator: float) -> Tensor:
    """[B, T] d loss / d logp through the loss itself."""
    leaf = batch["logp"].clone().requires_grad_()
    loss = estimator(TokenBatch(**(batch | {"logp": leaf})), denominator=denominator).loss
    return torch.autograd.grad(loss, leaf)[0]


def cut(order: list[int], cuts: set[int]) -> list[list[int]]:
    edges = [0, *sorted(cuts), len(order)]
    return [order[a:b] for a, b in pairwise(edges)]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "dpo"])
@settings(max_examples=5)
@given(
    seed=st.integers(0, 999), order=st.permutations(range(B)), cuts=st.sets(st.integers(1, B - 1), max_size=6)
)
def test_gradient_does_not_depend_on_microbatch_split(
    name: str, aggregation: str, seed: int, order: list[int], cuts: set[int]
) -> None:
    estimator = algorithm(name, aggregation=aggregation, kl_coef=0.1, **constant_length(aggregation))
    step = tensors(seed, name)
    whole = TokenBatch(**step)
    expected = weight_of(estimator, step, estimator.denominator(whole))
    if estimator.advantage_per_sequence:
        advantage = estimator.advantages(step["reward"], step["group"], step["source"])
        step["advantage"] = advantage[:, None].expand(B, T)
    same_group = step["group"][:, None] == step["group"]
    step["question_tokens"] = (same_group * step["mask"].sum(1)).sum(1)
    parts = [{key: value[torch.tensor(rows_)] for key, value in step.items()} for rows_ in cut(order, cuts)]
    denominator = sum(estimator.denominator(TokenBatch(**part)) for part in parts)
    got = torch.cat([weight_of(estimator, part, denominator) for part in parts])
    torch.testing.assert_close(got, expected[torch.tensor(order)], rtol=0, atol=1e-14)


def constant_length(aggregation: str) -> dict[str, Any]:
    return {"length": 17} if aggregation == "constant" else {}


def of_a_step(name: str) -> Estimator:
    """The algorithm as a part of a step takes it, which says what length its normaliser means."""
    return algorithm(name, **constant_length(algorithm(name).row.aggregation))


@given(cuts=st.sets(st.integers(1, 5), max_size=4), order=st.permutations(range(6)))
@settings(max_examples=20)
def test_dpo_does_not_depend_on_microbatch_split_between_pairs(cuts: set[int], order: list[int]) -> None:
    estimator, step = algorithm("dpo"), tensors(1, "dpo")
    expected = weight_of(estimator, step, 6.0)
    for chunk in cut(order, cuts):
        members = torch.tensor([*chunk, *(i + 6 for i in chunk)])
        part = {key: value[members] for key, value in step.items()}
        torch.testing.assert_close(weight_of(estimator, part, 6.0), expected[members], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_wider_padding_changes_nothing(name: str) -> None:
    estimator = algorithm(name, **({"length": 9} if name in ("dr_grpo", "hpt") else {}))
    step = tensors(4, name)
    wide = dict(step)
    for key, value in step.items():
        if value.dim() == 2:
            filler = (
                torch.zeros(B, 3, dtype=torch.bool) if key == "mask" else torch.full((B, 3), float("nan"))
            )
            wide[key] = torch.cat([filler, value, filler], dim=1)
    narrow_out, wide_out = estimator(TokenBatch(**step)), estimator(TokenBatch(**wide))
    torch.testing.assert_close(wide_out.token_weight[:, 3:-3], narrow_out.token_weight, rtol=0, atol=1e-15)
    assert wide_out.denominator == narrow_out.denominator
    assert (wide_out.token_weight[:, :3] == 0).all() and (wide_out.token_weight[:, -3:] == 0).all()


@pytest.mark.parametrize("name", NAMES)
def test_token_weight_is_the_gradient_of_the_sum_with_and_without_grad(name: str) -> None:
    estimator, step = of_a_step(name), tensors(5, name)
    with torch.no_grad():
        plain = estimator(TokenBatch(**step))
    assert plain.loss.item() == pytest.approx(plain.loss_sum.item() / plain.denominator, abs=1e-15)
    torch.testing.assert_close(plain.token_weight, weight_of(estimator, step, 1.0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_counts_by_its_weight(name: str) -> None:
    estimator, step = of_a_step(name), tensors(6, name)
    unit = weight_of(estimator, step | {"weight": torch.ones(B)}, 1.0)
    weighted = weight_of(estimator, step, 1.0)
    torch.testing.assert_close(weighted, unit * step["weight"][:, None], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extreme", ["logp", "ratio", "overflow", "underflow", "reference"])
def test_extreme_log_probabilities_give_finite_gradients(name: str, extreme: str) -> None:
    step = tensors(7, name, torch.float32)
    if extreme == "logp":
        step["logp"] = torch.full((B, T), -1e4)
    elif extreme == "reference":
        step["ref_logp"] = step["logp"] + 1e4
    else:
        shift = {"ratio": -40.0, "overflow": -1e4, "underflow": 1e4}[extreme]
        step["old_logp"] = step["logp"] + shift
    out = algorithm(name, kl_coef=0.1)(TokenBatch(**step))
    assert out.token_weight.isfinite().all() and out.loss.isfinite()
    assert all(torch.tensor(list(out.metrics.values())).isfinite())


@pytest.mark.parametrize("name", ["ppo", "grpo", "hpt"])
def test_a_ratio_of_e40_keeps_its_exact_gradient_where_nothing_clips(name: str) -> None:
    step = tensors(7, name)
    step["old_logp"], step["source"] = step["logp"] - 40, torch.zeros(B, dtype=torch.long)
    step |= {"advantage": torch.full((B, T), 0.5, dtype=torch.float64), "weight": torch.ones(B)}
    estimator = algorithm(name, stabilizer="none", aggregation="token_mean")
    expected = -0.5 * torch.tensor(40.0).double().exp() * step["mask"]
    torch.testing.assert_close(weight_of(estimator, step, 1.0), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows_without_tokens", [slice(0, 7), slice(None)])
def test_empty_masks_give_a_finite_loss_and_no_gradient_there(name: str, rows_without_tokens: slice) -> None:
    step = tensors(8, name)
    step["mask"][rows_without_tokens] = False
    out = algorithm(name)(TokenBatch(**step))
    assert out.loss.isfinite() and out.token_weight.isfinite().all()
    assert (out.token_weight[rows_without_tokens] == 0).all()


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("token_mean", 4), ("sequence_mean", 2), ("constant", 3 * 10), ("question_mean", 2)],
)
def test_denominators_count_what_their_names_say(aggregation: str, expected: int) -> None:
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    batch = TokenBatch(logp=-torch.ones(3, 3), mask=mask, group=torch.tensor([4, 5, 5]))
    estimator = algorithm("sft", aggregation=aggregation, length=10)
    assert estimator.denominator(batch) == pytest.approx(expected)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in TAKES_OFFLINE])
def test_a_row_for_rollouts_refuses_demonstrations(name: str) -> None:
    step = tensors(9, name) | {"source": torch.ones(B, dtype=torch.long)}
    with pytest.raises(ValueError, match=f"{name} trains on rollouts only and got 12 offline"):
        algorithm(name)(TokenBatch(**step))


NEEDED = {
    "rft": ["reward"],
    "ppo": ["old_logp", "values", "reward"],
    "grpo": ["old_logp", "reward", "group"],
    "reinforce": ["reward"],
    "gspo": ["old_logp"],
    "luffy": ["old_logp", "group"],
    "dpo": ["ref_logp", "pair", "reward"],
    "hpt": ["old_logp", "reward", "group"],
}


@pytest.mark.parametrize(("name", "field"), [(name, field) for name in NEEDED for field in NEEDED[name]])
def test_a_field_the_row_needs_and_lacks_is_named(name: str, field: str) -> None:
    step = tensors(10, name)
    del step[field]
    with pytest.raises(ValueError, match=rf"TokenBatch\.{field}"):
        algorithm(name)(TokenBatch(**step))


def test_sft_needs_log_probabilities_and_a_mask_alone() -> None:
    step = tensors(11, "sft")
    out = algorithm("sft")(TokenBatch(logp=step["logp"], mask=step["mask"]))
    torch.testing.assert_close(out.token_weight, -step["mask"].double())
    assert out.metrics["nll"] == pytest.approx(-step["logp"][step["mask"]].mean().item())


@pytest.mark.parametrize("name", ["ppo", "dpo"])
def test_an_advantage_that_differs_between_tokens_is_not_given_per_sequence(name: str) -> None:
    estimator = algorithm(name)
    assert not estimator.advantage_per_sequence
    with pytest.raises(ValueError, match="not one number a sequence"):
        estimator.advantages(torch.ones(2), torch.zeros(2, dtype=torch.long))


@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.1}, {"entropy_coef": 0.1}])
@pytest.mark.parametrize(("advantage", "weight"), [(0.0, 1.0), (0.5, 0.0), (-0.5, 0.3)])
def test_a_sequence_it_does_not_train_on_has_no_gradient(
    options: dict[str, float], advantage: float, weight: float
) -> None:
    step = tensors(16, "grpo")
    step |= {"advantage": torch.full((B, T), advantage), "weight": torch.full((B,), weight)}
    entropy = torch.ones(B, T, dtype=torch.float64).requires_grad_()
    out = algorithm("grpo", **options)(TokenBatch(**(step | {"entropy": entropy})))
    (pull,) = torch.autograd.grad(out.loss, entropy, allow_unused=True)
    moves = bool((out.token_weight != 0).any()) or (pull is not None and bool((pull != 0).any()))
    assert algorithm("grpo", **options).trains_on(advantage, weight) == moves


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dpo"])
def test_a_batch_of_no_sequences_has_a_loss_of_zero(name: str) -> None:
    step = {key: value[:0] for key, value in tensors(17, name).items()}
    assert of_a_step(name)(TokenBatch(**step), denominator=3.0).loss.item() == 0


def test_a_denominator_must_be_positive() -> None:
    with pytest.raises(ValueError, match="denominator must be above 0; got 0"):
        algorithm("sft")(TokenBatch(**tensors(12, "sft")), denominator=0)


def test_a_split_step_needs_its_length() -> None:
    batch = TokenBatch(**tensors(12, "dr_grpo"))
    assert algorithm("dr_grpo")(batch).loss.isfinite()
    with pytest.raises(ValueError, match=r"divides by the length of the batch; .* length="):
        algorithm("dr_grpo")(batch, denominator=3.0)


def test_metrics_tell_what_was_masked_and_who_pulled() -> None:
    logp = torch.tensor([[-1.0, -1.0], [-1.0, -3.0]])
    batch = TokenBatch(
        logp=logp,
        mask=torch.ones(2, 2, dtype=torch.bool),
        old_logp=logp - torch.tensor([[0.0, 1.0], [0.0, 0.0]]),
        rollout_logp=logp - torch.tensor([[0.0, 0.5], [9.0, 9.0]]),
        advantage=torch.ones(2, 2),
        source=torch.tensor([0, 1]),
    )
    metrics = algorithm("hpt", stabilizer="clip")(batch).metrics
    e = torch.tensor(1.0).exp().item()
    assert metrics["tokens"] == 4 and metrics["sequences"] == 2
    assert metrics["masked_fraction"] == 0.25
    assert metrics["nll"] == pytest.approx(1.5)
    assert metrics["ratio_max"] == pytest.approx(e)
    assert metrics["effective_sample_size"] == pytest.approx((3 + e) ** 2 / (4 * (3 + e**2)))
    assert metrics["offline_gradient_share"] == pytest.approx(2 / 3)
    assert metrics["engine_gap"] == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["hpt", "dapo", "grpo"])
def test_metrics_of_several_calls_are_those_of_one(name: str) -> None:
    """Among them a call without a token; the advantage is given, as the trainer gives it."""
    step = tensors(18, name) | {"advantage": torch.linspace(-1, 2, B * T, dtype=torch.float64).view(B, T)}
    step["mask"][3:] &= torch.arange(T) < 2
    step["mask"][0] = False
    estimator = of_a_step(name)

    def sums(rows: slice) -> dict[str, float]:
        return estimator(TokenBatch(**{key: x[rows] for key, x in step.items()}), denominator=1.0).sums

    parts = [sums(rows) for rows in (slice(0, 1), slice(1, 2), slice(2, B))]
    assert means(added(parts)) == pytest.approx(means(sums(slice(None))), rel=1e-6)
    assert means(added([])) == {"tokens": 0, "sequences": 0}


@pytest.mark.parametrize("field", [f.name for f in fields(TokenBatch) if f.name != "logp"])
def test_a_field_of_the_wrong_shape_is_named(field: str) -> None:
    step = tensors(13, "sft") | {field: torch.zeros(3, 3, dtype=torch.long)}
    with pytest.raises(ValueError, match=rf"TokenBatch\.{field} must"):
        TokenBatch(**step)


@pytest.mark.parametrize(
    "field",
    ["logp", "old_logp", "ref_logp", "rollout_logp", "values", "entropy", "advantage", "reward", "weight"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_names_its_field(field: str, value: float) -> None:
    step = tensors(14, "sft")
    step["advantage"] = torch.ones(B, T, dtype=torch.float64)
    step[field][2, ...] = value
    with pytest.raises(ValueError, match=rf"TokenBatch\.{field} holds NaN or infinity"):
        TokenBatch(**step)


@pytest.mark.parametrize("field", ["group", "source", "pair"])
def test_an_index_must_be_an_integer(field: str) -> None:
    with pytest.raises(ValueError, match=rf"TokenBatch\.{field} must hold integers"):
        TokenBatch(**(tensors(15, "sft") | {field: torch.zeros(B)}))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{"kl_coef": 0.2, "kl_in": "reward", "kl_form": "k1"}, {"entropy_coef": 0.1}]
)
def test_penalties_keep_empty_and_extreme_batches_finite(name: str, options: dict[str, Any]) -> None:
    step = tensors(18, name, torch.float32)
    step["mask"][:3] = False
    step["old_logp"], step["ref_logp"] = torch.full((B, T), -1e4), torch.full((B, T), -1e-3)
    out = algorithm(name, **options)(TokenBatch(**step))
    assert out.loss.isfinite() and out.token_weight.isfinite().all()
    assert (out.token_weight[:3] == 0).all()
