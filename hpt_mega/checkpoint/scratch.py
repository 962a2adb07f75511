"""Memory that tensors are read into one after another, so that a conversion touches no fresh page for each.

Fresh pages cost more than the bytes in them: the kernel zeroes them, and a virtual machine's host finds them.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import weakref

import torch
from torch import Tensor

_ALIGNMENT = 64


class Scratch:
    """One piece of memory, handed out from its beginning again once no tensor in it lives.

    It becomes as large as the largest set of tensors that lived at once; until then, those that come second
    and for which it has no room have memory of their own. Not for several threads.
    """

    def __init__(self) -> None:
        self._memory = _map(1)
        self._wanted = self._alive = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As torch.empty; the tensor and its views keep their place as long as one of them lives."""
        nbytes = math.prod(shape) * dtype.itemsize
        if not self._alive:
            if (wanted := max(self._wanted, nbytes)) > len(self._memory):
                self._memory = _map(wanted)
            self._wanted = 0
        begin, self._wanted = self._wanted, self._wanted + -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        if not nbytes or begin + nbytes > len(self._memory):
            return torch.empty(shape, dtype=dtype)
        place = (ctypes.c_char * nbytes).from_buffer(self._memory, begin)
        weakref.finalize(place, self._release)
        self._alive += 1
        return torch.frombuffer(place, dtype=dtype).view(shape)

    def _release(self) -> None:
        self._alive -= 1


def _map(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
