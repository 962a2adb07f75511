"""The endless order in which samples are served: a function of seed and position, so nothing need be kept.

Who gets which position is decided in loader.py and readers.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

BLOCK = 1000  # positions in which a mixture's shares are exact


class Order:
    """Maps positions 0, 1, 2, ... to indices of samples; a part's samples come once each before any repeats.

    sizes: samples of each part; indices count through the parts. weights: how often a part is drawn from, in
    proportion; None serves all parts as one. Raises ValueError for parts that are empty or hardly ever drawn.
    """

    def __init__(self, sizes: Sequence[int], seed: int, weights: Sequence[float] | None = None) -> None:
        if weights is None:
            sizes, weights = [sum(sizes)], [1.0]
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes are {list(sizes)}; each part needs at least one sample")
        if len(weights) != len(sizes) or not min(weights) > 0:
            raise ValueError(
                f"weights are {list(weights)}; expected one above 0 for each of {len(sizes)} parts"
            )
        self._sizes = list(sizes)
        self._seed = seed
        self._first = [0, *accumulate(sizes)]
        self._shares = shares(BLOCK, weights)
        if 0 in self._shares:
            raise ValueError(f"weights are {list(weights)}; a part below 1 in {2 * BLOCK} draws has no place")
        self._epoch = lru_cache(maxsize=2 * len(sizes))(self._draw_epoch)
        self._block = lru_cache(maxsize=2)(self._draw_block)

    def __getitem__(self, position: int) -> int:
        part, place = self._place(position)
        epoch, offset = divmod(place, self._sizes[part])
        return self._first[part] + self._epoch(part, epoch)[offset]

    def _place(self, position: int) -> tuple[int, int]:
        """(part, how often it was drawn from before) of a position."""
        if len(self._sizes) == 1:
            return 0, position
        block, offset = divmod(position, BLOCK)
        part, before = self._block(block)[offset]
        return part, block * self._shares[part] + before

    def _draw_block(self, block: int) -> list[tuple[int, int]]:
        parts = [part for part, share in enumerate(self._shares) for _ in range(share)]
        random.Random(f"{self._seed}:block:{block}").shuffle(parts)
        drawn = [0] * len(self._sizes)
        places = []
        for part in parts:
            places.append((part, drawn[part]))
            drawn[part] += 1
        return places

    def _draw_epoch(self, part: int, epoch: int) -> list[int]:
        order = list(range(self._sizes[part]))
        # A string seed is hashed by SHA-512: epochs of neighbouring seeds are unrelated.
        seed = f"{self._seed}:{epoch}" if len(self._sizes) == 1 else f"{self._seed}:{part}:{epoch}"
        random.Random(seed).shuffle(order)
        return order


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """total divided in proportion to the weights, by largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [int(value) for value in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: whole[i] - exact[i])
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole
