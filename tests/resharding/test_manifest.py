"""An engine's account of an update: what is damaged, absent or doubled is named."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpt_mega.resharding.manifest import Ledger, TransferError, check_names, checksums
from hpt_mega.resharding.planner import plan_update
from hpt_mega.spec import Spec

PLAN = plan_update({name: Spec(torch.float32, (3, 5)) for name in ("first", "second", "third")}, 128)


def filled(index: int) -> Tensor:
    torch.manual_seed(index)
    return torch.randint(0, 256, (128,), dtype=torch.uint8)


def announced(index: int) -> list[str]:
    return checksums(PLAN.buckets[index], filled(index))


def test_a_whole_update_is_accepted_in_any_order() -> None:
    ledger = Ledger(PLAN)
    assert len(PLAN.buckets) > 1
    for index in reversed(range(len(PLAN.buckets))):
        assert ledger.receive(index, filled(index), announced(index)) is PLAN.buckets[index]
    ledger.finish()


def test_one_changed_bit_is_found_and_its_tensor_named() -> None:
    buffer = filled(0)
    buffer[PLAN.buckets[0].slots[-1].offset + 3] ^= 1
    name = PLAN.buckets[0].slots[-1].name
    with pytest.raises(TransferError, match=f"bucket 0 arrived damaged: {name}$"):
        Ledger(PLAN).receive(0, buffer, announced(0))


def test_two_swapped_rows_are_found() -> None:
    buffer = filled(0)
    rows = PLAN.buckets[0].slots[0].view(buffer)
    rows[:2] = rows[[1, 0]].clone()
    with pytest.raises(TransferError, match="damaged: first"):
        Ledger(PLAN).receive(0, buffer, announced(0))


def test_a_missing_bucket_is_named_at_the_end() -> None:
    ledger = Ledger(PLAN)
    ledger.receive(0, filled(0), announced(0))
    with pytest.raises(TransferError, match="never arrived: third"):
        ledger.finish()


def test_a_bucket_that_comes_twice_or_is_not_in_the_plan_is_refused() -> None:
    ledger = Ledger(PLAN)
    ledger.receive(0, filled(0), announced(0))
    with pytest.raises(TransferError, match="bucket 0 came twice: first"):
        ledger.receive(0, filled(0), announced(0))
    with pytest.raises(TransferError, match="bucket 9 of a plan of 2"):
        ledger.receive(9, filled(0), announced(0))


def test_names_missing_unexpected_and_double_are_listed() -> None:
    check_names(["a", "b"], ["b", "a"], "tensors")
    with pytest.raises(TransferError, match="tensors: missing: c; unexpected: d; twice: a"):
        check_names(["a", "c"], ["a", "d", "a"], "tensors")
