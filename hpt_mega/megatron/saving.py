"""megatron-core's sharded saving in three parts: planned by all ranks, written by each, completed by all.

megatron-core forks processes for the second part, which outlive a killed rank; here any thread may do it.
What is saved is state.py's business, when and where checkpoint/store.py's.
"""

from __future__ import annotations

import os
import queue
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item

from megatron.core import dist_checkpointing  # isort: skip
from megatron.core.dist_checkpointing.strategies import filesystem_async  # isort: skip
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest  # isort: skip
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy  # isort: skip

BACKEND = ("torch_dist", 1)


class StateWriter:
    """A state on its way into a folder that exists. Making it is collective; so is complete()."""

    def __init__(self, state: dict[str, Any], folder: Path, *, copied: bool) -> None:
        """Plan who writes what. `copied`: the state may change from now on, at the price of a second one
        in the host's memory; otherwise it has to stay as it is until write() returns."""
        # megatron-core would start a manager process for this queue; here both its ends are in this process
        self._results = filesystem_async._results_queue = queue.Queue()
        strategy = _Strategy(copied)
        self._request: AsyncRequest = dist_checkpointing.save(
            state, str(folder), sharded_strategy=strategy, async_sharded_save=True
        )
        self._writer = strategy.writer

    def write(self) -> list[Path]:
        """Write this rank's files, in any thread; returns them once they are on the disk."""
        written: list[Path] = []
        results = {}
        for number, (path, key, (texts, tensors)) in enumerate(self._writer.write_buckets):
            with open(path, "wb") as stream:
                results[number] = [
                    _write_item(
                        self._writer.transforms, stream, data, item, key, SerializationFormat.TORCH_SAVE
                    )
                    for item, data in (*texts, *tensors)
                ]
                stream.flush()
                os.fsync(stream.fileno())
            written.append(Path(path))
        self._writer.write_buckets = [(path, key, ([], [])) for path, key, _ in self._writer.write_buckets]
        self._results.put(results)
        return written

    def complete(self) -> None:
        """Add the files that describe the others, after every rank has written its own."""
        for finalize in self._request.finalize_fns:
            finalize()


class _Strategy(TorchDistSaveShardedStrategy):
    """Plans as megatron-core does, and keeps the plan's writer in place of a function that forks."""

    def __init__(self, copied: bool) -> None:
        super().__init__(*BACKEND, thread_count=1)
        self._copied = copied
        self.writer: Any = None

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        request = super()._get_save_and_finalize_callbacks(writer, planned)
        for _, _, (_, tensors) in writer.write_buckets:
            for number, (item, tensor) in enumerate(tensors):  # one by one: some are megatron-core's copies
                tensors[number] = (item, tensor.to("cpu", copy=self._copied))
        self.writer = writer
        return request._replace(async_fn=None, async_fn_args=(), preload_fn=None)
