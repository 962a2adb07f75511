"""The safetensors file format, read and written a tensor at a time at known offsets, without memory maps.

The package of that name maps or holds whole files; a conversion's memory must not depend on their size. What
folders of such files mean is in hf.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from hpt_mega.spec import CODED_DTYPES, DTYPE_CODES, Spec

_RANK = {dtype: rank for rank, dtype in enumerate(DTYPE_CODES)}
_ROWS_BYTES = 2**18  # fits a core's cache
_LONGEST_HEADER = 100 * 2**20


def member(folder: Path, name: str) -> Path:
    """A folder's file by the name that an index gives. Raises ValueError where it could lie elsewhere."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise ValueError(
            f"the index of {folder} names the file {name!r}, expected the name of a file in the folder "
            "itself: with others a checkpoint could reach any file. Correct the index, or do not use it"
        )
    return folder / name


@dataclass(frozen=True)
class Slot:
    """A tensor's place in a file."""

    spec: Spec
    offset: int  # in bytes, from the file's begin


def read_header(path: Path) -> dict[str, Slot]:
    """Where each tensor of a file is. Raises ValueError where the file is damaged, and says how."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{path} is no safetensors file, or cut off: {size} bytes, header of {length}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"{path} has a damaged header: {error}; copy the file again") from None
    header.pop("__metadata__", None)
    slots = {name: _slot(path, name, entry, 8 + length) for name, entry in header.items()}
    end = max((slot.offset + slot.spec.nbytes for slot in slots.values()), default=8 + length)
    if end != size:
        raise ValueError(
            f"{path} holds {size} bytes and its header describes {end}; the file is "
            f"{'cut off' if size < end else 'followed by something else'}: copy it again"
        )
    return slots


def _slot(path: Path, name: str, entry: Mapping[str, Any], data_begin: int) -> Slot:
    try:
        begin, end = (int(offset) for offset in entry["data_offsets"])
        shape = tuple(int(size) for size in entry["shape"])
        code = str(entry["dtype"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{path} describes {name} as {entry}; copy the file again") from None
    if code not in CODED_DTYPES:
        raise ValueError(f"{path} holds {name} as {code}; expected one of {', '.join(CODED_DTYPES)}")
    spec = Spec(CODED_DTYPES[code], shape)
    if end - begin != spec.nbytes:
        raise ValueError(
            f"{path} gives {name} {end - begin} bytes, expected {spec.nbytes} for {list(shape)} of {code}"
        )
    return Slot(spec, data_begin + begin)


def read_into(file: BinaryIO | FileIO, target: Tensor, offset: int) -> None:
    """Fill a tensor, or a strided view of one, in row order.

    Raises ValueError where the file ends before it.
    """
    for part in _row_order(target):
        row_order = part if part.is_contiguous() else torch.empty(part.shape, dtype=part.dtype)
        view = raw_bytes(row_order)
        while view:  # a single call moves at most 2 GiB
            count = os.preadv(file.fileno(), [view], offset)
            if count == 0:
                raise ValueError(f"{file.name} ends {len(view)} bytes before the tensor does")
            view, offset = view[count:], offset + count
        if row_order is not part:
            part.copy_(row_order)


def write_from(file: BinaryIO | FileIO, tensor: Tensor, offset: int) -> int:
    """Write a tensor, or a strided view of one, in row order; returns the offset behind it."""
    begin = offset
    for part in _row_order(tensor):
        offset = write_bytes(file, raw_bytes(part), offset)
    start_writeback(file, begin, offset - begin)
    return offset


def write_bytes(file: BinaryIO | FileIO, data: bytes | memoryview, offset: int) -> int:
    """Write all of them; returns the offset behind."""
    view = memoryview(data)
    while view:
        count = os.pwrite(file.fileno(), view, offset)
        view, offset = view[count:], offset + count
    return offset


def start_writeback(file: BinaryIO | FileIO, offset: int, length: int) -> None:
    """Let the disk begin with what was just written, so that the fsync in the end finds little left.

    The advice's own meaning, to forget these pages, comes to nothing: they are still dirty.
    """
    if length:
        os.posix_fadvise(file.fileno(), offset, length, os.POSIX_FADV_DONTNEED)


def checksum(tensor: Tensor) -> str:
    """The xxh3 of the bytes in row order. Against damage, not forgery; it runs at the speed of memory."""
    digest = xxhash.xxh3_64()
    for part in _row_order(tensor):
        digest.update(raw_bytes(part))
    return digest.hexdigest()


def _row_order(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor as parts in row order: what lies so in memory at once, of the rest a few rows at a time."""
    if tensor.is_contiguous() or tensor.dim() < 2:
        yield tensor
    elif tensor[0].nbytes > _ROWS_BYTES:
        for part in tensor:
            yield from _row_order(part)
    else:
        yield from tensor.split(max(1, _ROWS_BYTES * len(tensor) // max(tensor.nbytes, 1)))


def raw_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes in row order; not a copy where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array) if flat.numel() else memoryview(b"")


def header_of(tensors: Mapping[str, Spec]) -> tuple[bytes, dict[str, Slot]]:
    """The begin of a file with these tensors and their places, byte for byte as the package lays them out."""
    order: Iterable[str] = sorted(tensors, key=lambda name: (-_RANK[tensors[name].dtype], name))
    described: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    position = 0
    for name in order:
        spec = tensors[name]
        begins[name] = position
        position += spec.nbytes
        described[name] = {
            "dtype": DTYPE_CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begins[name], position],
        }
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    slots = {name: Slot(tensors[name], 8 + len(text) + begin) for name, begin in begins.items()}
    return len(text).to_bytes(8, "little") + text, slots
