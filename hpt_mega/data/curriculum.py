"""Questions that are always solved are asked less often: which positions of the order a step takes.

Off unless data.keep_solved is below 1. The order itself is order.py's.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from hpt_mega.data.order import Order


class Curriculum:
    """Draws batches from an order, leaving out solved questions but for a share `keep` of the draws.

    A question counts as solved after a step in which all its rollouts were right. A step's batch depends on
    what was observed before, so steps are drawn one after another, and the state belongs in a checkpoint.
    """

    def __init__(self, order: Order, keep: float, seed: int) -> None:
        if not 0 < keep <= 1:
            raise ValueError(f"data.keep_solved is {keep}, expected above 0 and at most 1")
        self._order = order
        self._keep = keep
        self._seed = seed
        self._position = 0
        self._step = 0
        self._solved: set[int] = set()
        self._batch: list[int] = []

    def batch(self, step: int, size: int) -> list[int]:
        """Indices of step's batch; asked again for the same step it is the same. Raises ValueError."""
        if step == self._step:
            self._batch = []
            while len(self._batch) < size:
                index = self._order[self._position]
                draw = random.Random(f"{self._seed}:keep:{self._position}").random()
                if index not in self._solved or draw < self._keep:
                    self._batch.append(index)
                self._position += 1
            self._step += 1
        elif step != self._step - 1 or len(self._batch) != size:
            raise ValueError(
                f"step {step} is asked for, the curriculum is at {self._step}; restore its state"
            )
        return self._batch

    def observe(self, pass_rates: Sequence[float]) -> None:
        """What came of the last batch: the share of right rollouts of each of its questions."""
        for index, rate in zip(self._batch, pass_rates, strict=True):
            if rate >= 1.0:
                self._solved.add(index)
            else:
                self._solved.discard(index)

    def state(self) -> dict[str, Any]:
        return {"position": self._position, "step": self._step, "solved": sorted(self._solved)}

    def restore(self, state: dict[str, Any]) -> None:
        self._position, self._step = state["position"], state["step"]
        self._solved, self._batch = set(state["solved"]), []
