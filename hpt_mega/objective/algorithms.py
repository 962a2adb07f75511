"""The table: every post-training algorithm as four parts, a normaliser and a few numbers.

A row is data; a new algorithm is a new row, and a new part only where its paper has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

from hpt_mega.objective.advantage import SEQUENCE_ADVANTAGES, TOKEN_ADVANTAGES
from hpt_mega.objective.aggregation import AGGREGATIONS
from hpt_mega.objective.estimator import Estimator, Row
from hpt_mega.objective.likelihood import LIKELIHOODS
from hpt_mega.objective.options import Options
from hpt_mega.objective.reference import REFERENCES
from hpt_mega.objective.regularizer import KL_FORMS, PLACES
from hpt_mega.objective.stabilizer import STABILIZERS
from hpt_mega.objective.surrogate import Parts

_CLIPPED = "1[r not clipped] · r · A · ∇log π,  r = π/π_old"
_GROUP_NORM = "A = (R - mean_group) / std_group"

_ROWS = (
    Row(
        "sft",
        paper="maximum likelihood on demonstrations",
        formula="∇log π",
        parts=Parts("one", "current"),
        any_source=True,
        aggregation="token_mean",
    ),
    Row(
        "rft",
        paper="RAFT, arXiv 2304.06767",
        formula="1[R > 0] · ∇log π",
        parts=Parts("correct", "current"),
        any_source=True,
        aggregation="token_mean",
    ),
    Row(
        "ppo",
        paper="PPO, arXiv 1707.06347",
        formula=f"{_CLIPPED},  A = GAE(gae_gamma, gae_lambda)",
        parts=Parts("gae", "old", "clip"),
        aggregation="token_mean",
    ),
    Row(
        "grpo",
        paper="GRPO, arXiv 2402.03300",
        formula=f"{_CLIPPED},  {_GROUP_NORM}",
        parts=Parts("group_norm", "old", "clip"),
        aggregation="sequence_mean",
    ),
    Row(
        "dr_grpo",
        paper="Dr.GRPO, arXiv 2503.20783",
        formula=f"{_CLIPPED},  A = R - mean_group",
        parts=Parts("group_mean", "old", "clip"),
        aggregation="constant",
    ),
    Row(
        "dapo",
        paper="DAPO, arXiv 2503.14476",
        formula=f"{_CLIPPED},  {_GROUP_NORM}",
        parts=Parts("group_norm", "old", "clip"),
        aggregation="token_mean",
        options=Options(clip_high=0.28),
    ),
    Row(
        "reinforce",
        paper="REINFORCE, Williams 1992",
        formula="R · ∇log π",
        parts=Parts("reward", "current"),
        aggregation="token_mean",
    ),
    Row(
        "reinforce_pp",
        paper="REINFORCE++, arXiv 2501.03262",
        formula=f"{_CLIPPED},  A = (R - mean_batch) / std_batch",
        parts=Parts("batch_norm", "old", "clip"),
        aggregation="token_mean",
    ),
    Row(
        "rloo",
        paper="RLOO, arXiv 2402.14740",
        formula="A · ∇log π,  A = R - mean of the others of the group",
        parts=Parts("leave_one_out", "current"),
        aggregation="token_mean",
    ),
    Row(
        "maxrl",
        paper="MaxRL, arXiv 2602.02710",
        formula="A · ∇log π,  A = (R - mean_group) / mean_group",
        parts=Parts("group_ratio", "current"),
        aggregation="token_mean",
    ),
    Row(
        "cispo",
        paper="CISPO (MiniMax-M1), arXiv 2506.13585",
        formula=f"clip(r) · A · ∇log π,  r = π/π_old,  {_GROUP_NORM}",
        parts=Parts("group_norm", "old", "cis_mask"),
        aggregation="token_mean",
    ),
    Row(
        "gspo",
        paper="GSPO, arXiv 2507.18071",
        formula=f"1[s not clipped] · s · A · ∇log π,  s = (π(τ)/π_old(τ))^(1/|τ|),  {_GROUP_NORM}",
        parts=Parts("group_norm", "sequence", "sequence_clip"),
        aggregation="sequence_mean",
        options=Options(clip_low=3e-4, clip_high=4e-4),
    ),
    Row(
        "srft",
        paper="SRFT, arXiv 2506.19767",
        formula=f"online: {_CLIPPED};  offline: A · ∇π;  {_GROUP_NORM} over rollouts and demonstration",
        parts=Parts("joint_group_norm", "old", "clip"),
        offline=Parts("joint_group_norm", "one"),
        aggregation="token_mean",
    ),
    Row(
        "srft_entropy",
        paper="SRFT with its entropy weights, arXiv 2506.19767",
        formula="online: ±1 · w · ∇log π,  w = entropy_rl · exp(H) where R > 0, else 1;  "
        f"offline: A · ∇π + entropy_sft · exp(-H) · ∇log π;  {_GROUP_NORM} over both",
        parts=Parts("sign", "current", "entropy_rl"),
        offline=Parts("joint_group_norm", "one"),
        imitation=Parts("one", "current", "entropy_sft"),
        aggregation="token_mean",
    ),
    Row(
        "luffy",
        paper="LUFFY, arXiv 2504.14945",
        formula=f"online: {_CLIPPED};  offline: A · γ/(π + γ)² · ∇π;  {_GROUP_NORM} over both",
        parts=Parts("joint_group_norm", "old", "clip"),
        offline=Parts("joint_group_norm", "one", likelihood="shaped"),
        aggregation="token_mean",
    ),
    Row(
        "dpo",
        paper="DPO, arXiv 2305.18290",
        formula="±β σ(-Δ) · ∇log π,  Δ = β (h_chosen - h_rejected),  h = log π(τ) - log π_ref(τ)",
        parts=Parts("preference", "current"),
        any_source=True,
        aggregation="pair_mean",
    ),
    Row(
        "hpt",
        paper="HPT, arXiv 2509.04419",
        formula="online: α · r · (R - mean_group) · ∇log π;  offline: β · ∇log π",
        parts=Parts("group_mean", "old"),
        offline=Parts("one", "current"),
        aggregation="constant",
    ),
)
_TABLE = {row.name: row for row in _ROWS}

_PART_TABLES: dict[str, Iterable[str]] = {
    "advantage": [*SEQUENCE_ADVANTAGES, *TOKEN_ADVANTAGES],
    "reference": REFERENCES,
    "stabilizer": STABILIZERS,
    "likelihood": LIKELIHOODS,
}
_OPTION_NAMES = [field.name for field in fields(Options)]


def rows() -> tuple[Row, ...]:
    """The whole table, in the order it is printed."""
    return _ROWS


def algorithm(name: str, **options: Any) -> Estimator:
    """The estimator of a row by its name, with options by their field's name.

    Numbers: the fields of Options. Parts are swapped by name: advantage, reference, stabilizer ("+" joins
    several), likelihood, and the same with the prefix offline_ for the demonstrations of a row that treats
    them apart; aggregation likewise. algorithm("grpo", stabilizer="cis_mask", clip_high=0.28).

    Raises ValueError for an unknown row, option or part, listing the known ones.
    """
    row = _TABLE[_known("algorithm", name, _TABLE)]
    for key, value in options.items():
        row = _with_option(row, key, value)
    return Estimator(row)


def _with_option(row: Row, key: str, value: Any) -> Row:
    if key in _OPTION_NAMES:
        return replace(row, options=replace(row.options, **{key: _checked_number(key, value)}))
    if key == "aggregation":
        return replace(row, aggregation=_known(key, value, AGGREGATIONS))
    part = key.removeprefix("offline_")
    prefixes = ("", "offline_") if row.offline is not None else ("",)
    known = [*_OPTION_NAMES, "aggregation", *(prefix + part for prefix in prefixes for part in _PART_TABLES)]
    _known(f"option of algorithm '{row.name}'", key, known)
    for one in str(value).split("+") if part == "stabilizer" else [value]:
        _known(part, one, _PART_TABLES[part])
    half = "parts" if key == part else "offline"
    swapped = replace(getattr(row, half), **{part: value})
    return replace(row, **{half: swapped})


def _checked_number(key: str, value: Any) -> Any:
    if key in (named := {"kl_form": KL_FORMS, "kl_in": PLACES}):
        return _known(key, value, named[key])
    if key == "length" and value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"option {key} must be a finite number, at least 0; got {value!r}")
    if key == "length" and value == 0:
        raise ValueError("option length must be above 0; give the longest response in tokens")
    return value


def _known(kind: str, name: Any, table: Iterable[str]) -> str:
    if name not in (known := list(table)):
        raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(known)}")
    return str(name)
