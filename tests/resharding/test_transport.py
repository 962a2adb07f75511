"""Buckets from several ranks, of one host or of two, to several engines, and what happens where one fails."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hpt_mega.resharding.gather import Gather
from hpt_mega.resharding.manifest import Ledger, TransferError
from hpt_mega.resharding.mapping.fusion import Piece
from hpt_mega.resharding.planner import Plan, plan_update, plan_writes
from hpt_mega.resharding.transport import SharedBuckets, stream
from hpt_mega.spec import Spec
from tests.ranks import run_ranks

SIZES = {"rows": (10, 3), "columns": (5, 8), "long": (40, 7), "last": (1, 2), "wide": (3,)}
DTYPES = {name: torch.bfloat16 for name in SIZES} | {"wide": torch.float64}
BUCKET = 384


class Engine:
    """Rebuilds the tensors from the memory alone, through its own mapping of it."""

    def __init__(self, path: str, plan: Plan, fails_at: int | None) -> None:
        self._plan, self._fails_at = plan, fails_at
        self._shared = SharedBuckets(path, plan.bucket_bytes)
        self.parts: dict[str, list[Tensor]] = {}
        self.version = -1

    def begin_update(self) -> None:
        self._ledger = Ledger(self._plan)

    def load(self, index: int, checksums: Sequence[str]) -> None:
        if index == self._fails_at:
            raise RuntimeError("out of memory")
        buffer = self._shared.buffer(index)
        for slot in self._ledger.receive(index, buffer, checksums).slots:
            self.parts.setdefault(slot.name, []).append(slot.view(buffer).clone())

    def finish_update(self, policy_version: int) -> None:
        self._ledger.finish()
        self.version = policy_version


def whole() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return {name: torch.randn(size, dtype=DTYPES[name]) for name, size in SIZES.items()}


def pieces(rank: int) -> list[tuple[str, Piece]]:
    tensors = whole()
    return [
        ("rows", Piece(0, 0, rank * 5, tensors["rows"][rank * 5 : rank * 5 + 5])),
        ("columns", Piece(0, 1, rank * 4, tensors["columns"][:, rank * 4 : rank * 4 + 4])),
        *([("long", Piece(0, 0, 0, tensors["long"]))] if rank == 1 else []),
        *([("wide", Piece(0, 0, 0, tensors["wide"]))] if rank == 1 else []),
        *([("last", Piece(0, 0, 0, tensors["last"]))] if rank == 0 else []),
    ]


def send(fails_at: int | None, far: bool) -> list[bool | str]:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    plan = plan_update({name: Spec(DTYPES[name], size) for name, size in SIZES.items()}, BUCKET)
    assert len(plan.buckets) == 3
    shared = SharedBuckets.create(BUCKET) if rank == 0 else None
    box = [shared.path if shared else None]
    dist.broadcast_object_list(box)
    if rank == 1 and not far:
        shared = SharedBuckets(str(box[0]), BUCKET)
    engines = (
        [Engine(shared.path, plan, None), Engine(shared.path, plan, fails_at)] if shared and rank == 0 else []
    )
    assert dist.group.WORLD is not None
    gather = Gather(plan_writes(plan, pieces(rank)), shared, dist.group.WORLD)
    try:
        stream(plan, gather.fill, shared, dist.group.WORLD, engines, policy_version=7)
    except (RuntimeError, TransferError) as error:
        return [f"{type(error).__name__}: {error}"]
    return [
        engine.version == 7
        and all(torch.equal(torch.cat(engine.parts[name]), tensor) for name, tensor in whole().items())
        for engine in engines
    ]


@pytest.mark.parametrize("far", [False, True])
def test_engines_receive_what_the_ranks_of_one_or_two_hosts_hold(tmp_path: Path, far: bool) -> None:
    assert run_ranks(send, 2, tmp_path, None, far) == [[True, True], []]


@pytest.mark.parametrize("bucket", [0, 1, 2])
def test_all_ranks_leave_where_an_engine_fails(tmp_path: Path, bucket: int) -> None:
    leader, other = run_ranks(send, 2, tmp_path, bucket, bucket == 1)
    assert leader == ["RuntimeError: out of memory"]
    assert "an engine did not take the weights" in other[0]


def test_the_memory_ends_with_its_maker() -> None:
    shared = SharedBuckets.create(64)
    descriptor = int(Path(shared.path).name)
    shared.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
