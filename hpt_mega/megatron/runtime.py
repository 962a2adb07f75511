"""Process groups and collectives of one training process. Who sits where, and how ranks agree."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from hpt_mega.config import Config, ParallelConfig
from hpt_mega.megatron import cpu

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """This process's place in the parallel layout, and its groups.

    The replica group (tensor x context x pipeline ranks of one data-parallel replica) works on the same
    questions; its first rank is `leader`.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup
    waiting_group: dist.ProcessGroup  # the same ranks over gloo: one that waits in NCCL keeps its GPU busy

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        on_gpu = torch.cuda.is_available()
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    @property
    def is_last_stage(self) -> bool:
        return self.pp_rank == self.pp_size - 1

    @property
    def leader(self) -> int:
        """Global rank of this replica's first rank."""
        return dist.get_global_rank(self.replica_group, 0)

    @property
    def is_leader(self) -> bool:
        return self.rank == self.leader

    def stage_rank(self, stage: int) -> int:
        """Global rank of this process's peer on pipeline stage `stage`."""
        return dist.get_global_rank(self.pp_group, stage)

    def broadcast_object(self, value: T | None) -> T:
        """Give every rank of this replica the leader's object."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=self.leader, group=self.waiting_group)
        return box[0]

    def from_rank_zero(self, value: T | None) -> T | None:
        """Give every rank of the job rank 0's object."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum_over_data(self, values: Sequence[float]) -> list[float]:
        """Sum numbers (fp64) over the data-parallel ranks."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, group=self.dp_group)
        return total.tolist()

    def max_over_world(self, values: Sequence[float]) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return total.tolist()

    def gather_over_data(self, value: T) -> list[T]:
        """The same object of every data-parallel rank, in rank order."""
        box: list[Any] = [None] * self.dp_size
        dist.all_gather_object(box, value, group=self.dp_group)
        return box


def initialize(cfg: Config) -> Layout:
    """Join the job: default process group, Megatron's groups, seeds. Call once per process."""
    cpu.install()
    if cfg.trainer.deterministic:
        repeat_exactly()
    if cfg.precision.dtype == "fp32":  # Transformer Engine asks for TF32 in products of fp32
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=cfg.trainer.deadline_s))
    layout = build_groups(cfg.parallel, timedelta(seconds=cfg.trainer.deadline_s))
    _seed(cfg)
    return layout


def shutdown() -> None:
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def build_groups(parallel: ParallelConfig, deadline: timedelta) -> Layout:
    """Megatron's groups over the default process group, whose size must be the layout's."""
    from megatron.core import parallel_state as ps

    if dist.get_world_size() != parallel.world_size:
        raise ValueError(
            f"{dist.get_world_size()} processes were started, but {parallel.product}; start that many"
        )
    ps.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        distributed_timeout_minutes=math.ceil(deadline / timedelta(minutes=1)),
        create_gloo_process_groups=dist.get_backend() != "fake",  # the ranks of a dry run have no peers
    )
    replica_group, waiting_group = _replica_groups(parallel, deadline)
    return Layout(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=ps.get_tensor_model_parallel_rank(),
        tp_size=parallel.tp,
        pp_rank=ps.get_pipeline_model_parallel_rank(),
        pp_size=parallel.pp,
        cp_rank=ps.get_context_parallel_rank(),
        cp_size=parallel.cp,
        dp_rank=ps.get_data_parallel_rank(),
        dp_size=parallel.dp,
        tp_group=ps.get_tensor_model_parallel_group(),
        pp_group=ps.get_pipeline_model_parallel_group(),
        cp_group=ps.get_context_parallel_group(),
        dp_group=ps.get_data_parallel_group(),
        replica_group=replica_group,
        waiting_group=waiting_group,
    )


def _replica_groups(
    parallel: ParallelConfig, deadline: timedelta
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """The ranks of this process's replica, whose order is tensor, context, data, pipeline (fastest first)."""
    inner = parallel.tp * parallel.cp
    stride = inner * parallel.dp
    replicas = [
        [stage * stride + replica * inner + i for stage in range(parallel.pp) for i in range(inner)]
        for replica in range(parallel.dp)
    ]
    mine: dist.ProcessGroup
    mine, _ = dist.new_subgroups_by_enumeration(replicas, timeout=deadline)
    if dist.get_backend() != "nccl":
        return mine, mine
    waiting, _ = dist.new_subgroups_by_enumeration(replicas, timeout=deadline, backend="gloo")
    return mine, waiting


def _seed(cfg: Config) -> None:
    from megatron.core import tensor_parallel

    random.seed(cfg.seed)
    np.random.seed(cfg.seed)
    torch.manual_seed(cfg.seed)
    tensor_parallel.model_parallel_cuda_manual_seed(cfg.seed)


# What cuBLAS, NCCL and Transformer Engine choose algorithms by, at their first call.
_REPEATABLE = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "NCCL_ALGO": "Ring",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",
}


def repeat_exactly() -> None:
    """Have all libraries give the same bits for the same input; what the environment says already stays.

    Megatron-LM's deterministic mode sets the same. Raises RuntimeError, later, in an operation that cannot.
    """
    torch.use_deterministic_algorithms(True)
    for name, value in _REPEATABLE.items():
        os.environ.setdefault(name, value)
