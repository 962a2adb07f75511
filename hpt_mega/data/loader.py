"""Which questions a step trains on: a function of the step alone, so that a resumed run needs no other state.

Questions are made in questions.py; this file only chooses among them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache

from hpt_mega.trajectory import Question


class QuestionLoader:
    """Serves each question once an epoch, in an order drawn anew for each epoch from (seed, epoch).

    The steps' batches follow each other without a gap across epochs. A step's batch is the same for every
    dp_size: data-parallel rank r gets its r-th contiguous part. Raises ValueError where questions_per_step is
    not a multiple of dp_size or exceeds the number of questions.
    """

    def __init__(
        self, questions: Sequence[Question], questions_per_step: int, dp_rank: int, dp_size: int, seed: int
    ) -> None:
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank is {dp_rank}, expected 0 to {dp_size - 1}")
        if questions_per_step < 1 or questions_per_step % dp_size:
            raise ValueError(
                f"trainer.questions_per_step is {questions_per_step}, "
                f"expected a multiple of parallel.dp={dp_size}"
            )
        if questions_per_step > len(questions):
            raise ValueError(
                f"trainer.questions_per_step is {questions_per_step} and there are {len(questions)} training "
                "questions; raise data.train_questions or lower questions_per_step"
            )
        self._questions = questions
        self._per_step = questions_per_step
        self._per_rank = questions_per_step // dp_size
        self._dp_rank = dp_rank
        self._order = lru_cache(maxsize=2)(lambda epoch: _permutation(len(questions), seed, epoch))

    def indices(self, step: int) -> list[int]:
        """Indices into the questions of this rank's part of step's batch; step counts from 0."""
        first = step * self._per_step + self._dp_rank * self._per_rank
        positions = (divmod(first + i, len(self._questions)) for i in range(self._per_rank))
        return [self._order(epoch)[offset] for epoch, offset in positions]

    def next_batch(self, step: int) -> list[Question]:
        """This rank's questions of step."""
        return [self._questions[i] for i in self.indices(step)]


def _permutation(size: int, seed: int, epoch: int) -> list[int]:
    order = list(range(size))
    # A string seed is hashed by SHA-512: epochs of neighbouring seeds are unrelated.
    random.Random(f"{seed}:{epoch}").shuffle(order)
    return order
