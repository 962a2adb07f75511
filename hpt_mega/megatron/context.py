"""Context parallelism around the model: which tokens and response tokens of a micro-batch are this rank's.

Attention across the ranks is attention.py's (on GPUs Transformer Engine's) business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.data.packing import MicroBatch, context_places
from hpt_mega.megatron import cpu
from hpt_mega.megatron.runtime import Layout

cpu.install()

from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region  # noqa: E402


@dataclass(frozen=True)
class Queries:
    """The M of a micro-batch's N response tokens that this rank predicts, and from where."""

    numbers_M: Tensor  # among the N
    places_M: Tensor  # in this rank's hidden states
    count: int  # N
    group: dist.ProcessGroup | None  # None: this rank has all of them

    def gather(self, values_M: Tensor) -> Tensor:
        """[N] the values of all ranks; each rank's gradient flows back to its own."""
        if self.group is None:
            return values_M
        own_N = values_M.new_zeros(self.count).index_put((self.numbers_M,), values_M)
        whole_N: Tensor = reduce_from_tensor_model_parallel_region(own_N, group=self.group)
        return whole_N


def own_queries(microbatch: MicroBatch, layout: Layout) -> Queries:
    """Which response tokens this context-parallel rank predicts."""
    count = len(microbatch.places_N)
    if layout.cp_size == 1:
        numbers = torch.arange(count, device=microbatch.places_N.device)
        return Queries(numbers, microbatch.places_N, count, None)
    local_S = torch.full_like(microbatch.tokens_1S[0], -1)
    places = _places(microbatch, layout)
    local_S[places] = torch.arange(len(places), device=places.device)
    local_N = local_S[microbatch.places_N]
    numbers_M = (local_N >= 0).nonzero()[:, 0]
    return Queries(numbers_M, local_N[numbers_M], count, layout.cp_group)


def own_tokens(microbatch: MicroBatch, layout: Layout) -> Tensor:
    """[1, S / context-parallel size] the tokens that this rank computes."""
    if layout.cp_size == 1:
        return microbatch.tokens_1S
    return microbatch.tokens_1S[:, _places(microbatch, layout)]


def _places(microbatch: MicroBatch, layout: Layout) -> Tensor:
    places = context_places(microbatch.boundaries_K.tolist(), layout.cp_rank, layout.cp_size)
    return places.to(microbatch.tokens_1S.device)
