"""Which sequences share a micro-batch and which rank computes it: token budgets, balanced work."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from hpt_mega.trajectory import Trajectory

Plan = list[list[list[int]]]  # indices by rank and micro-batch


@dataclass
class _Bin:
    """One micro-batch in the making."""

    cost: float = 0.0
    tokens: int = 0
    indices: list[int] = field(default_factory=list)


def plan_microbatches(
    lengths: Sequence[int],
    budget: int,
    ranks: int = 1,
    *,
    quadratic: float = 0.0,
    count_multiple: int = 1,
    together: Sequence[int] | None = None,
) -> Plan:
    """Pack sequences into micro-batches of at most `budget` tokens, equally many on every rank.

    The work of a sequence of L tokens is L + quadratic * L**2: the second term is attention's. Micro-batches
    are made as equal in work as the budget lets them (longest first, each to the one with the least work
    that has room), then dealt out so that ranks have equal sums and like micro-batches at the same time; a
    rank's heaviest comes first, so memory that does not suffice is known at once. A sequence beyond the
    budget goes alone. Surplus micro-batches are empty.

    count_multiple: what the number of a rank's micro-batches is a multiple of (an interleaved pipeline's
    need). `together` [N] keeps indices with the same number in one micro-batch.
    """
    units: dict[int, list[int]] = {}
    for index in range(len(lengths)):
        units.setdefault(together[index] if together else index, []).append(index)
    sized = [
        (sum(lengths[i] for i in unit), sum(lengths[i] * (1 + quadratic * lengths[i]) for i in unit), unit)
        for unit in units.values()
    ]
    sized.sort(key=lambda unit: (-unit[0], unit[2]))
    step = ranks * count_multiple
    rounds = max(1, -(-sum(min(tokens, budget) for tokens, _, _ in sized) // (budget * step)))
    rounds += rounds // 64  # many full micro-batches rarely come out to the last token
    while (bins := _fill(sized, budget, rounds * step)) is None:
        rounds += max(1, rounds // 64)
    return _deal(bins, ranks)


def share_prompts(trajectories: Sequence[Trajectory], most: int) -> tuple[list[int], list[int]]:
    """(lengths, together) for plan_microbatches where a prompt stands in a row once for its responses.

    Responses to a prompt stay together, in parts of at most `most` tokens that a pair may exceed; the first
    of a part has the prompt's tokens besides its own.
    """
    lengths, together = [], []
    tokens: list[int] = []  # by part
    latest: dict[tuple[int, ...], int] = {}  # part of a prompt
    part_of_pair: dict[int, int] = {}
    standing: set[tuple[int, tuple[int, ...]]] = set()
    for t in trajectories:
        prompt, length = t.prompt_tokens, len(t.response_tokens)
        part = part_of_pair.get(t.pair)
        if part is None:
            part = latest.get(prompt)
            if part is None or tokens[part] + length > most:
                part = latest[prompt] = len(tokens)
                tokens.append(0)
            if t.pair >= 0:
                part_of_pair[t.pair] = part
        if (part, prompt) not in standing:
            standing.add((part, prompt))
            length += len(prompt)
        tokens[part] += length
        lengths.append(length)
        together.append(part)
    return lengths, together


def _fill(units: Sequence[tuple[int, float, list[int]]], budget: int, count: int) -> list[_Bin] | None:
    """The units (tokens, work, indices), largest first, in `count` bins; None where the budget is too small.

    A bin without room for one unit is parked until units are small enough, so each is looked at but a few
    times.
    """
    bins = [_Bin() for _ in range(count)]
    open_bins = [(0.0, number) for number in range(count)]
    parked: list[tuple[int, int]] = []  # (-room, number)
    for tokens, cost, indices in units:
        while parked and -parked[0][0] >= tokens:
            number = heapq.heappop(parked)[1]
            heapq.heappush(open_bins, (bins[number].cost, number))
        while open_bins:
            number = heapq.heappop(open_bins)[1]
            room = budget - bins[number].tokens
            if tokens <= room or not bins[number].indices:
                break
            heapq.heappush(parked, (-room, number))
        else:
            return None
        chosen = bins[number]
        chosen.cost += cost
        chosen.tokens += tokens
        chosen.indices += indices
        heapq.heappush(open_bins, (chosen.cost, number))
    return bins


def _deal(bins: list[_Bin], ranks: int) -> Plan:
    """Rounds of like bins, heaviest first; in each, the heaviest goes to the rank with the least work."""
    bins.sort(key=lambda one: -one.cost)
    plan: Plan = [[] for _ in range(ranks)]
    work = [0.0] * ranks
    for start in range(0, len(bins), ranks):
        for rank, given in zip(
            sorted(range(ranks), key=work.__getitem__), bins[start : start + ranks], strict=True
        ):
            plan[rank].append(sorted(given.indices))
            work[rank] += given.cost
    return plan
