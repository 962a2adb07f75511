"""What a replica's ranks bring to an engine, against the folder that they loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpt_mega.checkpoint.hf import HFCheckpoint
from hpt_mega.resharding.assembly import Assembly
from hpt_mega.resharding.transport import SharedBuckets
from tests.ranks import run_ranks
from tests.rollout import served

pytestmark = pytest.mark.timeout(280)


class Reader:
    """A Receiver that keeps what it reads."""

    def __init__(self, sync: Any) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._sync = sync

    def begin_update(self) -> None:
        self._shared = SharedBuckets(self._sync.path, self._sync.plan.bucket_bytes)
        self._assembly = Assembly()

    def load(self, index: int, checksums: Sequence[str]) -> None:
        bucket = self._sync.plan.buckets[index]
        for name, tensor in self._assembly.take(bucket, self._shared.buffer(index)):
            self.tensors[name] = tensor.clone()

    def finish_update(self, policy_version: int) -> None: ...


def brought(folder: Path) -> dict[str, Tensor]:
    from hpt_mega.config import ParallelConfig
    from hpt_mega.rollout.sync import WeightSync
    from tests.megatron.tiny import build_policy, config

    policy = build_policy(folder, config(ParallelConfig(tp=2, pp=1, ep=2)), train=False)
    sync = WeightSync(policy.model, policy.family, policy.shape, policy.layout, 300_000)
    reader = Reader(sync)
    sync.send([reader] if policy.layout.is_leader else [], 1)
    return reader.tensors


def test_a_replica_whose_ranks_share_experts_brings_all_of_them(tmp_path: Path) -> None:
    folder, _ = served.save_models(tmp_path, "qwen3_moe", tied=False)
    found = run_ranks(brought, 2, tmp_path, folder)[0]
    expected = HFCheckpoint(folder)
    assert found.keys() == set(expected.names())
    assert all(torch.equal(found[name], expected.tensor(name)) for name in found)
