"""The table of algorithms as a page for readers, written from the rows and from the parts' docstrings.

docs/algorithms.md is its output (`hpt algorithms --markdown`); the rows live in algorithms.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hpt_mega.objective.advantage import SEQUENCE_ADVANTAGES, TOKEN_ADVANTAGES
from hpt_mega.objective.aggregation import AGGREGATIONS
from hpt_mega.objective.algorithms import rows
from hpt_mega.objective.estimator import Row
from hpt_mega.objective.likelihood import LIKELIHOODS
from hpt_mega.objective.options import Options
from hpt_mega.objective.reference import REFERENCES
from hpt_mega.objective.regularizer import KL_FORMS
from hpt_mega.objective.stabilizer import STABILIZERS
from hpt_mega.objective.surrogate import Parts

_CLIP = ("clip_low", "clip_high")
_READS: dict[str, tuple[str, ...]] = {  # the options a part reads; a part that is not here reads none
    "clip": _CLIP,
    "sequence_clip": _CLIP,
    "cis_mask": _CLIP,
    "dual_clip": (*_CLIP, "clip_dual"),
    "entropy_sft": ("entropy_sft",),
    "entropy_rl": ("entropy_rl",),
    **{f"truncated_{level}": ("correction_high",) for level in ("token", "sequence", "geometric")},
    **{
        f"masked_{level}": ("correction_low", "correction_high")
        for level in ("token", "sequence", "geometric")
    },
    **{f"reject_{level}": ("reject_low", "reject_high") for level in ("token", "sequence", "geometric")},
    "shaped": ("shaping_gamma",),
    "power": ("shaping_power",),
    "group_norm": ("std_eps",),
    "joint_group_norm": ("std_eps",),
    "batch_norm": ("std_eps",),
    "gae": ("gae_gamma", "gae_lambda"),
    "preference": ("beta",),
    "constant": ("length",),
}

_INTRODUCTION = """\
# Algorithms

Written by `hpt algorithms --markdown`; change the table in `hpt_mega/objective/algorithms.py` instead.

Every algorithm is one estimator with four parts exchanged (the Unified Policy Gradient Estimator,
arXiv 2509.04419):

    gradient = stabilizer · (1 / reference) · advantage · ∇ likelihood(π)

    algorithm("grpo", clip_high=0.28)                                        # Python
    hpt train algorithm=grpo algorithm.stabilizer=cis_mask                   # command line

A sum over tokens is divided by a denominator of the whole step, taken over all micro-batches and ranks
before the first of them, so that no loss depends on how the step is split. π is the current policy, π_old
that of before the step's updates (which made the rollouts, unless `rollout.staleness` lets them lag),
r = π/π_old, A the advantage, R the reward, H the entropy. Demonstrations (offline sequences) have parts of
their own where a row says so; rows without them refuse demonstrations, save sft, rft and dpo, which treat
every sequence alike.
"""

_NOTES = """\
## Where a published version differs

- **Normaliser.** reinforce, rloo, maxrl and ppo are published as sums over a sequence's tokens, averaged over
  sequences: `aggregation=constant length=1`. Here they take the mean over all tokens of the step, as common
  implementations do.
- **grpo.** The KL term of the paper (k3, 0.04) is off; `kl_coef=0.04` turns it on.
- **cispo.** MiniMax-M1 leaves the lower bound out: `clip_low=1`.
- **reinforce_pp.** Rewards are whitened over the step's sequences. With `kl_in=reward` the penalty of the
  whole sequence is subtracted, as in RLOO; the paper gives each token the penalties from itself on.
- **srft.** The row is the one of the HPT paper's table: the demonstration's off-policy half alone.
  srft_entropy is the whole of the SRFT paper: ±1 on rollouts, and an SFT term on the demonstration, both
  weighted by the sequence's mean entropy.
- **luffy.** The authors' runs leave the standard deviation out: `advantage=joint_group_mean
  offline_advantage=joint_group_mean`, and no clipping of rollouts: `stabilizer=none`. Their other shapings:
  `offline_likelihood=` `log`, `square_root` or `power`, or `shaping_gamma=0.3` and `0.5`.
- **hpt.** As dr_grpo without clipping on rollouts, and the SFT loss on demonstrations with the same
  normaliser: a demonstration counts as one rollout, times `offline_coef`. The authors' code divides either
  loss by what one micro-batch holds, so that the balance of the two moves with the split
  (`bench/results/objective_agreement.md`); its coefficient is 1 for 7B models and 0.3 for 1.5B.
  The normaliser counts the sequences that the gate keeps: of 16 questions with 8 rollouts each, one that
  learns from its rollouts has 8/100 of it where four learn from demonstrations, and 8/44 where twelve do.
- **rft.** Rejected rollouts count in the normaliser, so that the scale of its gradient is the pass rate's.
- **Temperature.** `rollout.temperature` divides the logits of everything that is trained on, demonstrations
  too: the policy that learns is the one that was sampled.
- **std.** Unbiased (n - 1), plus `std_eps`; a group whose rewards are all equal has advantage 0.
- **kl_in=reward** takes the KL of the policy that sampled and subtracts it before the advantage; kl_in=loss
  adds it to the loss, on every token trained on. Advantages that read a reward as right or wrong (correct,
  sign, group_ratio) take the latter only.
"""


def options_of(row: Row) -> dict[str, Any]:
    """The options that the parts and the normaliser of a row read, with the row's defaults."""
    names = [*_READS.get(row.aggregation, ()), *(("offline_coef",) if row.offline is not None else ())]
    for parts in (row.parts, row.offline, row.imitation):
        if parts is not None:
            for part in (parts.advantage, *parts.stabilizer.split("+"), parts.likelihood):
                names += _READS.get(part, ())
    return {name: getattr(row.options, name) for name in dict.fromkeys(names)}


def markdown() -> str:
    """The page docs/algorithms.md."""
    sections = [
        _INTRODUCTION,
        "## Rows\n",
        *(_row(row) for row in rows()),
        _NOTES,
        _extras(),
        _parts("Advantages", {**SEQUENCE_ADVANTAGES, **TOKEN_ADVANTAGES}),
        _parts("References", REFERENCES),
        _parts("Stabilizers", STABILIZERS),
        _parts("Likelihoods", LIKELIHOODS),
        _parts("Aggregations", AGGREGATIONS),
        _parts("KL forms, delta = log π_ref - log π", KL_FORMS),
    ]
    return "\n".join(sections)


def _row(row: Row) -> str:
    lines = [f"### {row.name}", "", row.paper, ""]
    lines += [f"    {formula}" for formula in row.formula.split(";  ")]
    lines += ["", "| | advantage | reference | stabilizer | likelihood |", "|---|---|---|---|---|"]
    online = "every sequence" if row.any_source else "rollouts"
    halves = [(online, row.parts), ("demonstrations", row.offline), ("and also", row.imitation)]
    lines += [_cells(where, parts) for where, parts in halves if parts is not None]
    options = ", ".join(f"{name} {_number(value)}" for name, value in options_of(row).items())
    lines += ["", f"Normaliser: {row.aggregation}. Options: {options or 'none of its own'}.", ""]
    return "\n".join(lines)


def _cells(where: str, parts: Parts) -> str:
    return f"| {where} | {parts.advantage} | {parts.reference} | {parts.stabilizer} | {parts.likelihood} |"


def _extras() -> str:
    default = Options()
    names = ("kl_coef", "kl_form", "kl_in", "entropy_coef")
    said = ", ".join(f"{name} {_number(getattr(default, name))}" for name in names)
    return f"## Options of every row\n\n{said}. And every part by its name, below.\n"


def _parts(title: str, table: Mapping[str, Callable[..., Any]]) -> str:
    lines = [f"## {title}", ""]
    for name, function in table.items():
        reads = _READS.get(name, ())
        defaults = ", ".join(f"{key} {_number(getattr(Options(), key))}" for key in reads)
        said = " ".join((function.__doc__ or "").split())
        lines.append(f"- **{name}**{f' ({defaults})' if defaults else ''}: {said}")
    return "\n".join([*lines, ""])


def _number(value: Any) -> str:
    if value is None:
        return "rollout.max_new_tokens"
    return f"{value:g}" if isinstance(value, float) else str(value)
