"""Token files that Megatron's own tools read: .bin and .idx of an IndexedDataset, written by its builder.

Reading them back without megatron-core is in data/store.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)
from numpy.typing import NDArray


class TokenWriter:
    """Writes documents of one or more sequences; the files are whole once finish() has returned.

    prefix: the files' path without .bin and .idx. vocabulary: its size decides between uint16 and int32.
    """

    def __init__(self, prefix: Path, vocabulary: int) -> None:
        self._prefix = str(prefix)
        self.dtype: Any = DType.optimal_dtype(vocabulary)
        self._builder = IndexedDatasetBuilder(get_bin_path(self._prefix), dtype=self.dtype)

    def add(self, sequences: Sequence[NDArray[Any]]) -> None:
        """One document; its sequences may be empty."""
        self._builder.add_document(np.concatenate(sequences), [len(sequence) for sequence in sequences])

    def finish(self) -> None:
        self._builder.finalize(get_idx_path(self._prefix))

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._builder.data_file.close()
