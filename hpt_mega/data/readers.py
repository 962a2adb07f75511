"""Tokens of stored questions read ahead in batches, by a DALI pipeline or torch's DataLoader, in one order.

Which questions make a batch comes from outside as lists of indices; what they are is in store.py.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from hpt_mega.data.store import PARTS, TokenFile

QUEUED = 2  # batches that DALI has ready ahead of the one that is asked for

Plan = Iterable[list[int]]  # the documents of each batch


@dataclass(frozen=True)
class TokenBatch:
    """Right-padded documents: the tokens of prompt, demonstration and rejected response after each other."""

    tokens_BS: Tensor  # int32, 0 after the end
    lengths_B3: Tensor  # int32


def read_batches(file: TokenFile, plan: Plan, reader: str = "torch") -> Iterator[TokenBatch]:
    """The batches of the plan in order. reader: torch or dali, which give equal batches.

    Raises ValueError for an unknown reader, ImportError where DALI is not installed.
    """
    if reader not in READERS:
        raise ValueError(f"data.reader is {reader!r}, expected one of {', '.join(READERS)}")
    return READERS[reader](file, plan)


class _Batches(Dataset[TokenBatch]):
    """A map from lists of indices to batches; the DataLoader hands the plan's lists to it."""

    def __init__(self, file: TokenFile) -> None:
        self._file = file
        self._lengths = file.lengths.reshape(-1, PARTS)
        self._totals = self._lengths.sum(1)
        self._starts = file.starts[::PARTS]

    def __getitems__(self, indices: Sequence[int]) -> TokenBatch:
        tokens, lengths = self.read(indices)
        return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(lengths))

    def read(self, indices: Sequence[int]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """(tokens [B, S], lengths [B, 3]) of documents: the sequences of one lie side by side in the file."""
        chosen = np.asarray(indices)
        totals = self._totals[chosen]
        tokens = np.zeros((len(chosen), max(1, int(totals.max()))), np.int32)
        data = self._file.tokens
        for row, start, count in zip(tokens, self._starts[chosen].tolist(), totals.tolist(), strict=True):
            row[:count] = data[start : start + count]
        return tokens, self._lengths[chosen]


def _torch_batches(file: TokenFile, plan: Plan) -> Iterator[TokenBatch]:
    return iter(DataLoader(_Batches(file), batch_sampler=plan, collate_fn=lambda batch: batch))


def _dali_batches(file: TokenFile, plan: Plan) -> Iterator[TokenBatch]:
    try:
        dali, fn, types = (import_module(f"nvidia.dali{part}") for part in ("", ".fn", ".types"))
    except ImportError as error:
        raise ImportError(f"data.reader=dali needs {error.name}: pip install 'hpt_mega[dali]'") from error
    batches = iter(plan)
    source = _Batches(file)
    lent: deque[Any] = deque(maxlen=2 * QUEUED)  # the pipeline reads these arrays without a copy of its own
    # A whole batch is one sample to DALI: its cost a sample is many times that of copying a document.
    pipeline = dali.Pipeline(
        batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=QUEUED, exec_dynamic=False
    )

    def next_batch() -> tuple[list[NDArray[np.int32]], ...]:
        lent.append(source.read(next(batches)))  # StopIteration ends the epoch
        return tuple([part] for part in lent[-1])

    with pipeline:
        tokens, lengths = fn.external_source(
            next_batch,
            num_outputs=2,
            dtype=[types.INT32, types.INT32],
            ndim=[2, 2],
            no_copy=True,
        )
        pipeline.set_outputs(tokens, lengths)
    pipeline.build()
    while True:
        try:
            padded, counts = pipeline.run()
        except StopIteration:
            return
        # tensors of their own: the pipeline takes the memory of an output back at its next run
        yield TokenBatch(*(torch.from_numpy(output.at(0).copy()) for output in (padded, counts)))


READERS = {"torch": _torch_batches, "dali": _dali_batches}
