"""A run's checkpoints: damage is found and gone around, a full disk costs one checkpoint and not the run."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Timer

import pytest
import torch.distributed as dist

from hpt_mega.checkpoint.store import SUMS, CheckpointError, CheckpointStore, damage
from hpt_mega.cli import main
from tests.ranks import run_ranks


@pytest.fixture
def alone() -> Iterator[None]:
    """A job of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@dataclass
class Files:
    """Some files in place of a state; what goes wrong, and when, is given."""

    folder: Path
    text: str = ""
    error: BaseException | None = None
    held: Event | None = None  # until it is set, writing takes

    def write(self) -> list[Path]:
        if self.held:
            assert self.held.wait(60)
        file = self.folder / f"rank{dist.get_rank()}"
        file.write_text(self.text)
        if self.error:
            raise self.error
        return [file]

    def complete(self) -> None:
        if dist.get_rank() == 0:
            (self.folder / "deep").mkdir()
            (self.folder / "deep" / "state").write_text(f"state of {self.text}")


def write(store: CheckpointStore, step: int, error: BaseException | None = None) -> None:
    store.begin(step, lambda folder: Files(folder, text=f"weights of {step}", error=error))
    store.settle()


def full(number: int = errno.ENOSPC) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("harm", ["a flipped bit", "a cut file", "a lost file", "lost sums", "torn sums"])
def test_resuming_goes_around_a_damaged_checkpoint_and_says_so(
    harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (5, 10, 15):
        write(store, step)
    assert store.latest_whole() == 15
    weights, sums = store.path(15) / "rank0", store.path(15) / SUMS
    if harm == "a flipped bit":
        data = bytearray(weights.read_bytes())
        data[3] ^= 4
        weights.write_bytes(data)
    elif harm == "a cut file":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif harm == "a lost file":
        (store.path(15) / "deep" / "state").unlink()
    elif harm == "lost sums":
        sums.unlink()
    else:
        sums.write_text(sums.read_text()[:20])
    assert store.latest_whole() == 10
    said = capsys.readouterr().out
    assert f"{store.path(15)} is damaged" in said
    assert "going back" in said
    (tmp_path / "config.yaml").touch()
    assert main(["checkpoints", "verify", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("; whole") == 2


@pytest.mark.usefixtures("alone")
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    assert store.latest_whole() is None
    for step in (5, 10):
        write(store, step)
        (store.path(step) / "rank0").unlink()
    damaged = r"(?s)no whole checkpoint .*step_000010 is damaged: rank0 is missing.*000005.*resume=never"
    with pytest.raises(CheckpointError, match=damaged):
        store.latest_whole()
    assert store.steps() == [5, 10]


def no_room(path: Path, data: bytes) -> int:
    raise full()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("when", ["in writing", "from the first byte"])
def test_a_full_disk_costs_one_checkpoint_and_not_the_run(
    when: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    write(store, 5)
    if when == "in writing":
        write(store, 10, full())
    else:
        monkeypatch.setattr(Path, "write_bytes", no_room)
        store.begin(10, Files)
        store.settle()
    assert store.steps() == [5]
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    said = capsys.readouterr().out
    assert "step 10 was not written" in said
    assert "No space left on device" in said
    assert "the last good one is that of step 5" in said
    assert damage(store.path(5)) == []


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_counts_once_it_is_written_and_the_next_one_waits_for_it(tmp_path: Path) -> None:
    store, held = CheckpointStore(tmp_path, keep=3), Event()
    store.begin(5, lambda folder: Files(folder, "weights", held=held))
    store.settle(wait=False)  # after a step of training
    assert store.steps() == []
    assert store.latest_whole() is None
    Timer(0.2, held.set).start()
    store.begin(10, lambda folder: Files(folder, "weights"))
    assert store.steps() == [5]
    store.settle()
    assert store.steps() == [5, 10]
    assert damage(store.path(10)) == []


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_is_on_the_disk_before_older_ones_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 5)
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))

    def prune(keep: int) -> list[int]:
        whole = store.path(10)
        assert {path.stat().st_ino for path in (*whole.rglob("*"), whole, whole.parent)} <= synced
        pruned.append(10)
        return []

    pruned: list[int] = []
    monkeypatch.setattr(store, "prune", prune)
    write(store, 10)
    assert pruned == [10] and store.steps() == [5, 10]


@pytest.mark.usefixtures("alone")
def test_later_checkpoints_than_a_run_begins_with_take_no_place_of_its_own(tmp_path: Path) -> None:
    earlier = CheckpointStore(tmp_path, keep=2)
    for step in (10, 20, 30):
        write(earlier, step)
    store = CheckpointStore(tmp_path, keep=2)
    store.set_aside(after=20)
    for step in (21, 22):
        write(store, step)
    assert store.steps() == [21, 22] and store.latest_whole() == 22
    assert (tmp_path / "checkpoints" / "step_000030.aside" / SUMS).is_file()


@pytest.mark.usefixtures("alone")
def test_a_writer_that_hangs_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    store, held = CheckpointStore(tmp_path, keep=3, deadline_s=0.1), Event()
    store.begin(5, lambda folder: Files(folder, held=held))
    with pytest.raises(CheckpointError, match=r"rank 0 .* step 5: not done after 0.1 s"):
        store.settle()
    held.set()


def one_rank_fails(root: str) -> list[object]:
    """Rank 1 meets a full disk at step 4, and a bug at step 5."""
    dist.init_process_group("gloo")
    store = CheckpointStore(Path(root), keep=2)
    errors = {4: full(errno.EDQUOT), 5: RuntimeError("a bug")} if dist.get_rank() == 1 else {}
    for step in (1, 2, 3, 4):
        write(store, step, errors.get(step))
    found = [store.latest_whole(), store.steps(), sorted(path.name for path in store.path(3).iterdir())]
    with pytest.raises(CheckpointError) as error:
        write(store, 5, errors.get(5))
    dist.destroy_process_group()
    return [*found, str(error.value)]


def test_ranks_agree_on_a_checkpoint_that_one_of_them_could_not_write(tmp_path: Path) -> None:
    root = tmp_path / "run"
    found = run_ranks(one_rank_fails, 2, tmp_path, str(root))
    said = "rank 1 could not write the checkpoint of step 5: RuntimeError: a bug"
    assert found == [[3, [2, 3], ["deep", "rank0", "rank1", SUMS], said]] * 2


@pytest.mark.usefixtures("alone")
def test_checkpoints_are_listed_and_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = CheckpointStore(tmp_path, keep=5)
    for step in (1, 2, 3, 4):
        write(store, step)
    store.set_aside(after=3)
    (tmp_path / "config.yaml").touch()
    capsys.readouterr()
    assert main(["checkpoints", "list", str(tmp_path)]) == 0
    listed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["step 1", "step 2", "step 3", "step_000004.aside"]
    writing = tmp_path / "checkpoints" / "step_000004.partial"
    writing.mkdir()
    assert main(["checkpoints", "prune", str(tmp_path), "--keep", "1"]) == 0
    assert capsys.readouterr().out == "removed: 1, 2, step_000004.aside; left: 3\n"
    assert store.steps() == [3] and not store.aside() and writing.is_dir()  # a run may be at it
    assert main(["checkpoints", "prune", str(tmp_path), "--keep", "0"]) == 2
    assert main(["checkpoints", "list", str(tmp_path / "absent")]) == 2
