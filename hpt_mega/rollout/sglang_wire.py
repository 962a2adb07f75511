"""How weights reach an SGLang server: flattened buckets, through memory on this host or a broadcast.

Read from sglang 0.5.23: srt/weight_sync/tensor_bucket.py, srt/utils/common.py (MultiprocessingSerializer,
SafeUnpickler, init_custom_process_group), srt/model_executor/model_runner_components/weight_updater.py.
"""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.multiprocessing import reductions

from hpt_mega.rollout.engine import EngineError

LOAD_FORMAT = "flattened_bucket"
_POLL_S = 0.001
_DEVICE = 6  # rebuild_cuda_tensor's argument that names the device


def aligned(tensors: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Named tensors with wide types first: the receiver views bytes in place, at multiples of their width."""
    return sorted(tensors, key=lambda entry: -entry[1].dtype.itemsize)


def flatten(tensors: list[tuple[str, Tensor]]) -> Tensor:
    """All tensors' bytes, one after the other: uint8 [bytes], on the tensors' device."""
    return torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in tensors])


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def serialize(tensors: list[tuple[str, Tensor]], flat: Tensor) -> str:
    """The message that lets one process of this host map `flat`: a pickle in base64, which SGLang demands.

    It holds a handle, not the data: `flat` must live until the server has answered. We only ever write such
    a message. On CUDA the device is named by its UUID, as the same GPU may have another number over there.
    """
    metadata, start = [], 0
    for name, tensor in tensors:
        end = start + tensor.numel() * tensor.dtype.itemsize
        metadata.append(
            SimpleNamespace(
                name=name,
                shape=tensor.shape,
                dtype=tensor.dtype,
                start_idx=start,
                end_idx=end,
                numel=end - start,
            )
        )
        start = end
    text = io.BytesIO()
    pickler = ForkingPickler(text)
    if flat.is_cuda:
        pickler.dispatch_table[Tensor] = _cuda_handle
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")  # a descriptor would reach our children only
    try:
        pickler.dump({"flattened_tensor": flat, "metadata": metadata})
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
    return base64.b64encode(text.getvalue()).decode()


def _cuda_handle(tensor: Tensor) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    rebuild, arguments = reductions.reduce_tensor(tensor)
    uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE]).uuid)
    return rebuild, (*arguments[:_DEVICE], uuid, *arguments[_DEVICE + 1 :])


class BroadcastGroup:
    """The trainer's end, rank 0, of a process group with the ranks of one server.

    It stands beside the default group. Made with the function that SGLang makes its end with, since both ends
    must agree on the keys of the rendezvous.
    """

    def __init__(self, host: str, port: int, world_size: int, name: str, backend: str, deadline_s: float):
        """Waits for the server's ranks. Raises EngineError where they do not come within the deadline."""
        self.name = name
        self._deadline_s = deadline_s
        timeout = timedelta(seconds=deadline_s)
        try:
            store = dist.TCPStore(host, port, world_size, is_master=True, timeout=timeout)
            self._group, _ = c10d._new_process_group_helper(
                world_size,
                0,
                [],
                dist.Backend(backend),
                dist.PrefixStore(name, store),
                group_name=c10d.GroupName(name),
                timeout=timeout,
            )
        except (RuntimeError, ValueError) as error:
            raise EngineError(f"group {name} of {world_size} ranks at {host}:{port}: {error}") from None
        c10d._world.pg_group_ranks[self._group] = {rank: rank for rank in range(world_size)}

    def send(self, flat: Tensor, answer: Future[Any]) -> None:
        """Broadcast, until the server has answered too. Raises what the answer raises, or EngineError."""
        work = dist.broadcast(flat, src=0, group=self._group, async_op=True)
        must_end_by = time.monotonic() + self._deadline_s
        while not (work.is_completed() and answer.done()):
            if answer.done() and answer.exception() is not None:
                answer.result()
            if time.monotonic() > must_end_by:
                raise EngineError(f"a broadcast of {flat.numel()} bytes took over {self._deadline_s:g} s")
            time.sleep(_POLL_S)
        work.wait()
        answer.result()

    def close(self) -> None:
        dist.destroy_process_group(self._group)
