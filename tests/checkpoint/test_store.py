"""A run's checkpoints: damage is found and gone around, a full disk costs one checkpoint and not the run."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from hpt_mega.checkpoint.store import SUMS, CheckpointStore, damage
from hpt_mega.cli import main
from tests.ranks import run_ranks


@pytest.fixture
def alone() -> Iterator[None]:
    """A job of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def write(store: CheckpointStore, step: int) -> None:
    with store.writing(step) as folder:
        (folder / "weights").write_bytes(bytes(range(7)) * step)
        (folder / "deep").mkdir()
        (folder / "deep" / "state").write_text(f"state of {step}")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("harm", ["a flipped bit", "a cut file", "a lost file", "lost sums", "torn sums"])
def test_resuming_goes_around_a_damaged_checkpoint_and_says_so(
    harm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    for step in (5, 10, 15):
        write(store, step)
    assert store.latest_whole() == 15
    weights, sums = store.path(15) / "weights", store.path(15) / SUMS
    if harm == "a flipped bit":
        data = bytearray(weights.read_bytes())
        data[33] ^= 4
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
def test_a_full_disk_costs_one_checkpoint_and_not_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    write(store, 5)
    with store.writing(10) as folder:
        (folder / "weights").write_bytes(b"half of i")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert store.steps() == [5]
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    said = capsys.readouterr().out
    assert "step 10 was not written: No space left on device" in said
    assert "the last good one is that of step 5" in said
    assert damage(store.path(5)) == []


@pytest.mark.usefixtures("alone")
def test_an_error_that_storage_did_not_cause_passes_through(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=3)
    with pytest.raises(RuntimeError, match="a bug"), store.writing(5):
        raise RuntimeError("a bug")


def full_on_one_rank(root: str) -> list[object]:
    dist.init_process_group("gloo")
    store = CheckpointStore(Path(root), keep=2)
    for step in (1, 2, 3, 4):
        with store.writing(step) as folder:
            (folder / f"rank{dist.get_rank()}").write_text(f"{step}")
            if step == 4 and dist.get_rank() == 1:
                raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    found = [store.latest_whole(), store.steps(), sorted(path.name for path in store.path(3).iterdir())]
    dist.destroy_process_group()
    return found


def test_ranks_agree_on_a_checkpoint_that_one_of_them_could_not_write(tmp_path: Path) -> None:
    root = tmp_path / "run"
    found = run_ranks(full_on_one_rank, 2, tmp_path, str(root))
    assert found == [[3, [2, 3], ["rank0", "rank1", SUMS]]] * 2


@pytest.mark.usefixtures("alone")
def test_checkpoints_are_listed_and_pruned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = CheckpointStore(tmp_path, keep=5)
    for step in (1, 2, 3):
        write(store, step)
    (tmp_path / "config.yaml").touch()
    assert main(["checkpoints", "list", str(tmp_path)]) == 0
    listed = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["step 1", "step 2", "step 3"]
    assert main(["checkpoints", "prune", str(tmp_path), "--keep", "1"]) == 0
    assert store.steps() == [3]
    assert main(["checkpoints", "prune", str(tmp_path), "--keep", "0"]) == 2
    assert main(["checkpoints", "list", str(tmp_path / "absent")]) == 2
