"""How weights are packed for an SGLang server: flattened buckets, and handles of memory on this host.

Read from sglang 0.5.23: srt/weight_sync/tensor_bucket.py, srt/utils/common.py (MultiprocessingSerializer,
SafeUnpickler), srt/model_executor/model_runner_components/weight_updater.py.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

LOAD_FORMAT = "flattened_bucket"
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
