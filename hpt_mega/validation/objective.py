"""The algorithm and the gate, whether they go together, and the questions of a step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hpt_mega.config import Config
from hpt_mega.objective import Estimator, Row, algorithm
from hpt_mega.objective.advantage import COMPARES_ROLLOUTS, JOINT, OWN, READS_RIGHT_OR_WRONG
from hpt_mega.scheduler import gate


def batch(cfg: Config) -> Iterator[str]:
    """Whether a step's questions divide over replicas and updates, and exist."""
    questions, dp = cfg.trainer.questions_per_step, cfg.parallel.dp
    if dp > 0 and questions % dp:
        fitting = f"{max(1, questions // dp) * dp} or {(questions // dp + 1) * dp}"
        yield f"trainer.questions_per_step is {questions} and parallel.dp is {dp}; expected {fitting}"
    updates = cfg.trainer.updates_per_step
    if dp > 0 and questions // dp < updates:
        yield (
            f"trainer.updates_per_step is {updates} and a replica has {questions // dp} questions a step; an "
            "update needs at least one: lower updates_per_step or raise trainer.questions_per_step"
        )
    available = sum(part.questions for part in cfg.data.mixture) or cfg.data.train_questions
    if questions > available:
        yield (
            f"trainer.questions_per_step is {questions} and data.train_questions {available}; "
            "a step cannot ask more than there are"
        )


def parts(cfg: Config) -> Iterator[str]:
    """The algorithm, the gate, and whether the algorithm can train on what the gate sends."""
    n = cfg.rollout.rollouts_per_question
    try:
        estimator = algorithm(cfg.algorithm.name, **cfg.algorithm.options)
    except ValueError as error:
        yield f"algorithm: {error}"
        return
    try:
        weigh = gate(cfg.gate.name, **cfg.gate.options)
    except ValueError as error:
        yield f"gate: {error}"
        return
    row = estimator.row
    alpha, beta = weigh.at_every_rate(n)
    yield from _gate_fits(row, bool((alpha > 0).any()), bool((beta > 0).any()), cfg.gate.name)
    if bool(((alpha == 0) & (beta > 0)).any()) and _compares_with_rollouts(row):
        yield (
            f"algorithm={row.name} compares a demonstration with the rollouts of its question, which gate "
            f"{cfg.gate.name!r} leaves out: it would learn nothing there; set gate=both, or algorithm=hpt"
        )
    yield from _advantages(estimator)
    if n == 0 and bool(weigh(torch.zeros(1))[0]):
        yield (
            f"rollout.rollouts_per_question is 0 and gate {cfg.gate.name!r} keeps the rollouts of unsolved "
            "questions; set gate=demonstrations, or sample at least 1"
        )
    company = bool(((alpha > 0) & (beta > 0)).any())  # of a demonstration
    comparing = COMPARES_ROLLOUTS if company else COMPARES_ROLLOUTS | JOINT
    if n == 1 and bool((alpha > 0).any()) and row.parts.advantage in comparing:
        yield (
            f"algorithm={row.name} compares the rollouts of a question and rollout.rollouts_per_question "
            "is 1: there is nothing to compare; set at least 2"
        )


def _compares_with_rollouts(row: Row) -> bool:
    return row.offline is not None and row.offline.advantage in JOINT and row.imitation is None


def _advantages(estimator: Estimator) -> Iterator[str]:
    """Whether its two advantages go together, and with a KL that is taken from the rewards."""
    name, found = estimator.row.name, estimator.advantage_names
    if estimator.penalises_reward and estimator.trains_on_pairs:
        yield (
            f"algorithm={name} compares two responses and sees no rewards: kl_in=reward has no meaning "
            "there; its beta already holds the policy near the reference model"
        )
    if estimator.penalises_reward and (read := sorted(found & READS_RIGHT_OR_WRONG)):
        yield (
            f"algorithm={name} reads a reward as right or wrong (advantage {read[0]}), and kl_in=reward "
            "takes the KL from it, which would make right of wrong; set algorithm.kl_in=loss"
        )
    if estimator.needs_values and (others := sorted(found - OWN - {"gae"})):
        yield (
            f"algorithm={name} has the advantages gae and {others[0]}: gae is computed in each micro-batch, "
            f"which does not hold all that {others[0]} compares; take gae for both, or for none"
        )


def _gate_fits(row: Row, rollouts: bool, demonstrations: bool, gate_name: str) -> Iterator[str]:
    if demonstrations and row.offline is None and not row.any_source:
        yield (
            f"algorithm={row.name} trains on rollouts only and gate {gate_name!r} sends questions to their "
            "demonstrations; set gate=rollouts"
        )
    if rollouts and row.any_source and row.parts.advantage == "one":
        yield (
            f"algorithm={row.name} would imitate its own rollouts, right or wrong, where gate {gate_name!r} "
            "keeps them; set gate=demonstrations"
        )
