"""Which questions a step trains on: a function of the step alone, unless a curriculum bends it.

The order is order.py's, the curriculum and its state curriculum.py's; stored tokens are read by readers.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from hpt_mega.data.curriculum import Curriculum
from hpt_mega.data.order import Order
from hpt_mega.data.readers import TokenBatch, read_batches
from hpt_mega.data.store import StoredQuestions
from hpt_mega.trajectory import Question


class QuestionLoader:
    """Serves each question once an epoch, in an order drawn anew for each epoch from (seed, epoch).

    The steps' batches follow each other without a gap across epochs. A step's batch is the same for every
    dp_size: data-parallel rank r gets its r-th contiguous part. sizes and weights make it a mixture, whose
    parts have epochs of their own; keep_solved below 1 makes it a curriculum, whose batches depend on
    observe() too; reader is how the tokens of stored questions are read. Raises ValueError where
    questions_per_step is not a multiple of dp_size or exceeds the number of questions.
    """

    def __init__(
        self,
        questions: Sequence[Question],
        questions_per_step: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        *,
        sizes: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        keep_solved: float = 1.0,
        reader: str = "torch",
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
        self._order = Order(sizes or [len(questions)], seed, weights)
        self._curriculum = Curriculum(self._order, keep_solved, seed) if keep_solved != 1.0 else None
        self._reader = reader
        self._ahead: tuple[int, Iterator[TokenBatch]] | None = None

    def indices(self, step: int) -> list[int]:
        """Indices into the questions of this rank's part of step's batch; step counts from 0."""
        first = self._dp_rank * self._per_rank
        if self._curriculum is not None:
            return self._curriculum.batch(step, self._per_step)[first : first + self._per_rank]
        first += step * self._per_step
        return [self._order[first + i] for i in range(self._per_rank)]

    def next_batch(self, step: int) -> list[Question]:
        """This rank's questions of step."""
        indices = self.indices(step)
        if not isinstance(self._questions, StoredQuestions) or self._curriculum is not None:
            return [self._questions[i] for i in indices]
        batch = self._read(step)
        return self._questions.with_tokens(indices, batch.tokens_BS.numpy(), batch.lengths_B3.numpy())

    def _read(self, step: int) -> TokenBatch:
        """The tokens of step's batch, from a reader that goes on from step to step."""
        assert isinstance(self._questions, StoredQuestions)
        if self._ahead is None or self._ahead[0] != step:
            rows = (self._questions.rows(self.indices(later)) for later in count(step))
            self._ahead = (step, read_batches(self._questions.file, rows, self._reader))
        batches = self._ahead[1]
        self._ahead = (step + 1, batches)
        return next(batches)

    @property
    def has_curriculum(self) -> bool:
        return self._curriculum is not None

    def observe(self, pass_rates: Sequence[float]) -> None:
        """Tell a curriculum the pass rates of the last step's whole batch, over all ranks in order."""
        if self._curriculum is not None:
            self._curriculum.observe(pass_rates)

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the step; empty without a curriculum."""
        return self._curriculum.state() if self._curriculum is not None else {}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state. Raises ValueError where it is another loader's."""
        if bool(state) != self.has_curriculum:
            had = "a" if state else "no"
            raise ValueError(f"the checkpoint's run had {had} curriculum; set data.keep_solved as it was")
        if self._curriculum is not None:
            self._curriculum.restore(state)
