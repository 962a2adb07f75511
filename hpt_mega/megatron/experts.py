"""Which ranks share the experts of a mixture, by the groups that megatron-core has made for this process."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from hpt_mega.megatron import cpu

cpu.install()

from megatron.core import parallel_state as ps  # noqa: E402


@dataclass(frozen=True)
class ExpertRanks:
    """The ranks of a pipeline stage that together hold each expert once.

    In the group the expert-tensor-parallel rank varies fastest, then the expert-parallel one.
    """

    group: dist.ProcessGroup
    tp_size: int
    first_copy: bool  # whether the group holds the stage's first rank; others hold the same experts again

    def owners(self, expert: int, count: int) -> range:
        """Group ranks with the parts of one of `count` experts, in tensor-parallel order."""
        first = expert * (self.group.size() // self.tp_size) // count * self.tp_size
        return range(first, first + self.tp_size)


def ranks() -> ExpertRanks:
    return ExpertRanks(
        group=ps.get_expert_tensor_and_model_parallel_group(),
        tp_size=ps.get_expert_tensor_parallel_world_size(),
        first_copy=ps.get_expert_data_parallel_rank() == 0,
    )
