"""Buckets through the process group of a leader and an engine's workers, and peers that die or do not come.

The ranks are threads: each has a group of its own, as a process would.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import psutil
import pytest
import torch
from torch import Tensor

from hpt_mega.resharding.manifest import TransferError
from hpt_mega.resharding.network import BroadcastGroup, Meeting, NetworkBuckets, address_towards
from hpt_mega.resharding.planner import plan_update
from hpt_mega.spec import Spec

pytestmark = pytest.mark.timeout(120)
PLAN = plan_update({"a": Spec(torch.float32, (50, 3)), "b": Spec(torch.bfloat16, (7,))}, 512)
DEADLINE_S = 5.0


@contextmanager
def leader_of(
    workers: int, deadline_s: float = DEADLINE_S
) -> Iterator[tuple[BroadcastGroup, list[NetworkBuckets]]]:
    """The leader's end of a group, and what the workers hold."""
    with ThreadPoolExecutor(workers) as pool:

        def invite(meeting: Meeting) -> list[NetworkBuckets]:
            return list(pool.map(lambda rank: NetworkBuckets(meeting, rank, PLAN), range(1, 1 + workers)))

        joined: list[NetworkBuckets] = []
        group = BroadcastGroup.open(
            "127.0.0.1", 1 + workers, "weights", "gloo", deadline_s, lambda m: joined.extend(invite(m))
        )
        yield group, joined
        for one in joined:
            with suppress(AttributeError):  # left already
                one.close()
        group.close()


def bucket(index: int) -> Tensor:
    torch.manual_seed(index)
    return torch.randint(0, 256, (PLAN.buckets[index].nbytes,), dtype=torch.uint8)


def test_all_workers_of_an_engine_get_each_bucket() -> None:
    assert len(PLAN.buckets) == 2
    with leader_of(2) as (group, workers), ThreadPoolExecutor(2) as pool:
        for index in (0, 1, 0):
            received = [pool.submit(lambda one, i=index: one.buffer(i).clone(), one) for one in workers]
            group.send(bucket(index), lambda: None)
            assert all(torch.equal(one.result(), bucket(index)) for one in received)


@pytest.mark.parametrize("how", ["dies", "hangs", "refuses"])
def test_a_worker_that_takes_no_bucket_holds_the_leader_up_no_longer_than_the_deadline(how: str) -> None:
    large = torch.zeros(1 << 26, dtype=torch.uint8)  # more than the sockets hold
    with leader_of(1, deadline_s=2.0) as (group, (worker,)):
        if how == "dies":
            worker.close()
        wanted = {
            "dies": r"rank 0 of group weights at 127.0.0.1:\d+: its 1 others did not take a bucket",
            "hangs": r"its 1 others did not take a bucket within 2 s",
            "refuses": "bucket 0 arrived damaged",
        }[how]

        def announce() -> None:
            time.sleep(0.2 if how == "refuses" else 3.0)
            raise TransferError("bucket 0 arrived damaged")

        began = time.monotonic()
        with pytest.raises(TransferError, match=wanted):
            group.send(large, announce)
        assert time.monotonic() - began < 12.0  # and not the 600 s of torch


def test_ranks_that_do_not_meet_say_who_waited_for_whom() -> None:
    with pytest.raises(
        TransferError, match=r"rank 0 of group weights at .*: its 2 others did not meet within 1 s"
    ):
        BroadcastGroup.open("127.0.0.1", 3, "weights", "gloo", 1.0, lambda meeting: None)
    nobody = Meeting("127.0.0.1", 1, 2, "weights", "gloo", 1.0)
    with pytest.raises(TransferError, match=r"rank 1 of group weights at .*: rank 0 did not meet within 1 s"):
        NetworkBuckets(nobody, 1, PLAN)


def test_the_meeting_place_is_at_no_other_address_of_the_host() -> None:
    with leader_of(1) as (group, _):
        place = group._meeting
        listening = [one.laddr for one in psutil.Process().net_connections("tcp") if one.status == "LISTEN"]
        assert (place.host, place.port) in listening
        assert [host for host, port in listening if port == place.port] == ["127.0.0.1"]


def test_what_the_invited_answer_is_the_reason_where_they_refuse() -> None:
    def refuse(meeting: Meeting) -> None:
        raise ConnectionError("answered 401")

    with pytest.raises(ConnectionError, match="answered 401"):
        BroadcastGroup.open("127.0.0.1", 2, "weights", "gloo", 1.0, refuse)


def test_the_address_is_that_of_the_way_to_the_other_host() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(OSError, match=r"not known|failure"):
        address_towards("no.such.host.invalid")
