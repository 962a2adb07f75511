"""Sampling by inversion: the right distribution, the smallest nucleus, honest log-probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hpt_mega.rollout import sampling
from hpt_mega.rollout.engine import SamplingParams
from hpt_mega.rollout.sampling import sample_tokens, uniform_draws
from tests.repeatable import OnlyRepeatable

DRAWS = 20_000
LOGITS = torch.tensor([1.3, -0.4, 2.2, 0.1, -3.0, 2.1, 0.9])


def frequencies(logits: Tensor, temperature: float, top_p: float, seed: int = 0) -> Tensor:
    uniforms = uniform_draws(DRAWS, 1, seed)[:, 0]
    tokens, _ = sample_tokens(logits.expand(DRAWS, -1), uniforms, temperature, top_p)
    return torch.bincount(tokens, minlength=len(logits)) / DRAWS


def smallest_set(probability: Tensor, top_p: float) -> set[int]:
    """By adding the most likely tokens one after the other."""
    chosen: set[int] = set()
    total = 0.0
    for token in sorted(range(len(probability)), key=lambda i: -float(probability[i])):
        if total >= top_p:
            break
        chosen.add(token)
        total += float(probability[token])
    return chosen


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_frequencies_are_the_distributions(temperature: float) -> None:
    """Pearson's chi-square over 7 tokens: above 22.5 once in a thousand for a right sampler."""
    probability = torch.softmax(LOGITS.double() / temperature, -1)
    found = frequencies(LOGITS, temperature, 1.0)
    chi_square = float((DRAWS * (found - probability).square() / probability).sum())
    print(f"chi-square {chi_square:.1f}")
    assert chi_square < 22.5


@pytest.mark.parametrize("likely", [2, 1024], ids=["sorted where the set is large", "never sorted"])
@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.75, 0.95, 0.999])
def test_top_p_keeps_exactly_the_smallest_set_and_its_proportions(
    top_p: float, likely: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "_LIKELY", likely)
    probability = torch.softmax(LOGITS.double(), -1)
    kept = sorted(smallest_set(probability, top_p))
    found = frequencies(LOGITS, 1.0, top_p)
    assert found.nonzero()[:, 0].tolist() == kept
    expected = probability[kept] / probability[kept].sum()
    deviation = (expected * (1 - expected) / DRAWS).sqrt()
    assert bool(((found[kept] - expected).abs() < 4 * deviation + 1e-9).all())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (0.0, 1.0)])
def test_a_few_rows_at_a_time_draw_what_all_at_once_do(
    temperature: float, top_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = torch.randn(11, 13, generator=torch.Generator().manual_seed(2)) * 3
    uniforms = uniform_draws(11, 1, seed=3)[:, 0]
    tokens, logp = sample_tokens(logits, uniforms, temperature, top_p)
    for at_once in (1, 30, 13 * 11):  # one row, two, all
        monkeypatch.setattr(sampling, "_AT_ONCE", at_once)
        some_tokens, some_logp = sample_tokens(logits, uniforms, temperature, top_p)
        assert torch.equal(some_tokens, tokens)
        assert torch.equal(some_logp, logp)


@given(
    logits=st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12),
    uniform=st.floats(0, 1, exclude_max=True),
    top_p=st.floats(0.01, 1.0),
    temperature=st.floats(0.1, 3.0),
)
def test_a_draw_inverts_the_cumulative_distribution_of_what_is_kept(
    logits: list[float], uniform: float, top_p: float, temperature: float
) -> None:
    probability = torch.softmax(torch.tensor(logits) / temperature, -1)
    token, logp = sample_tokens(torch.tensor([logits]), torch.tensor([uniform]).double(), temperature, top_p)
    slack = 1e-5  # sums in fp32
    above = float(probability[probability > probability[token]].sum())
    assert above < top_p + slack
    assert float(logp) == pytest.approx(math.log(float(probability[token])), abs=1e-4)
    if top_p == 1.0:
        before, after = probability[: int(token)].sum(), probability[: int(token) + 1].sum()
        assert float(before) - slack <= uniform <= float(after) + slack


def test_greedy_takes_the_most_likely_and_reports_temperature_one() -> None:
    logits = torch.randn(9, 31, generator=torch.Generator().manual_seed(2))
    tokens, logp = sample_tokens(logits, uniform_draws(9, 1, 0)[:, 0], 0.0, 1.0)
    assert tokens.tolist() == [max(range(31), key=lambda v: float(row[v])) for row in logits]
    expected = [float(row[t] - row.logsumexp(0)) for row, t in zip(logits, tokens, strict=True)]
    assert logp.tolist() == pytest.approx(expected, abs=1e-6)


def test_the_log_probability_is_at_the_sampling_temperature_before_truncation() -> None:
    logits = torch.randn(40, 31, generator=torch.Generator().manual_seed(4))
    tokens, logp = sample_tokens(logits, uniform_draws(40, 1, 1)[:, 0], 0.7, 0.6)
    expected = [
        float(row[t] / 0.7 - (row.double() / 0.7).exp().sum().log())
        for row, t in zip(logits, tokens, strict=True)
    ]
    assert logp.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_ends_of_the_unit_interval_draw_tokens_that_have_a_probability() -> None:
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]] * 2)
    ends = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for top_p in (1.0, 0.9):
        tokens, logp = sample_tokens(logits, ends, 1.0, top_p)
        assert bool(logp.isfinite().all()), (top_p, tokens)


def test_a_gpu_draws_in_deterministic_mode_too() -> None:
    logits, uniforms = torch.randn(5, 31), uniform_draws(5, 1, 0)[:, 0]
    with OnlyRepeatable():
        for top_p in (1.0, 0.9):
            sample_tokens(logits, uniforms, 1.0, top_p)
        with pytest.raises(AssertionError, match="cumsum"):
            logits.cumsum(0)


def test_a_row_of_uniforms_does_not_depend_on_how_many_rows_follow() -> None:
    assert torch.equal(uniform_draws(7, 5, 3)[:4], uniform_draws(4, 5, 3))
    assert not torch.equal(uniform_draws(4, 5, 3), uniform_draws(4, 5, 4))


@pytest.mark.parametrize(
    "wrong",
    [
        {"n": 0},
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
    ],
    ids=str,
)
def test_impossible_sampling_is_refused(wrong: dict[str, Any]) -> None:
    given = {"n": 2, "max_new_tokens": 3} | wrong
    with pytest.raises(ValueError, match=str(next(iter(wrong.values())))):
        SamplingParams(**given)
