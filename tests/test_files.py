"""Files and folders that are whole or absent."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from hpt_mega import files


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    files.write_atomically(path, "old, ü")

    def no_space(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        files.write_atomically(path, "new")
    assert path.read_text("utf-8") == "old, ü"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_not_there_before_its_block_ends(tmp_path: Path) -> None:
    with files.writing_file(tmp_path / "out.jsonl") as file:
        file.write("1\n")
        assert not (tmp_path / "out.jsonl").exists()
    assert (tmp_path / "out.jsonl").read_text() == "1\n"
    with suppress(ValueError), files.writing_file(tmp_path / "out.jsonl") as file:
        file.write("2\n")
        raise ValueError
    assert (tmp_path / "out.jsonl").read_text() == "1\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_takes_the_old_one_s_place_only_when_it_is_filled(tmp_path: Path) -> None:
    out = tmp_path / "runs" / "hf"
    with files.writing_folder(out) as folder:
        (folder / "old").touch()
    with suppress(ValueError), files.writing_folder(out) as folder:
        (folder / "half").touch()
        raise ValueError
    assert [path.name for path in out.iterdir()] == ["old"]
    with files.writing_folder(out) as folder:
        (folder / "new").touch()
        assert (out / "old").exists()
    assert [path.name for path in out.iterdir()] == ["new"]
    assert list(out.parent.iterdir()) == [out]


def test_a_folder_is_on_the_disk_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, synced = tmp_path / "out", set()
    (out / "old").mkdir(parents=True)

    def note(descriptor: int) -> None:
        assert (out / "old").exists() or (out / "new").exists()
        synced.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(files.os, "fsync", note)
    with files.writing_folder(out) as folder:
        (folder / "new").touch()
        inodes = {path.stat().st_ino for path in (folder, folder / "new")}
    assert synced == inodes | {tmp_path.stat().st_ino}
    assert [path.name for path in out.iterdir()] == ["new"]


def test_what_a_kill_left_is_removed_and_what_another_process_fills_is_not(tmp_path: Path) -> None:
    fill = f"""
import os, sys
from pathlib import Path
from hpt_mega.files import writing_folder
with writing_folder(Path({str(tmp_path)!r}) / "out") as folder:
    (folder / "half").touch()
    print("filling", flush=True)
    sys.stdin.read()
    os._exit(1)
"""
    command, pipes = [sys.executable, "-c", fill], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:  # type: ignore[call-overload]
        assert other.stdout.readline() == b"filling\n"
        with files.writing_folder(tmp_path / "out"):
            pass
        assert len([path for path in os.listdir(tmp_path) if path.endswith(".partial")]) == 1
        other.stdin.close()
        other.wait(60)
    with files.writing_folder(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("moment", [1, 2])
def test_a_kill_while_a_folder_is_replaced_loses_neither(moment: int, tmp_path: Path) -> None:
    """Before the first or the second of the two renames."""
    replace = f"""
import os
from pathlib import Path
from hpt_mega.files import writing_folder
renames = [None] * {moment}
rename = Path.rename
def kill_at_last(path, to):
    renames.pop()
    return rename(path, to) if renames else os._exit(1)
Path.rename = kill_at_last
with writing_folder(Path({str(tmp_path)!r}) / "out") as folder:
    (folder / "new").touch()
"""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    assert subprocess.run([sys.executable, "-c", replace]).returncode == 1
    assert len(list(tmp_path.glob("*/old"))) == len(list(tmp_path.glob(".*.partial/new"))) == 1
    with suppress(ValueError), files.writing_folder(tmp_path / "out"):
        raise ValueError
    assert list(tmp_path.rglob("*")) == [tmp_path / "out", tmp_path / "out" / "old"]


def test_what_a_sole_writer_left_on_another_host_is_removed(tmp_path: Path) -> None:
    left = [tmp_path / f".hf.node7.cluster.{os.getppid()}.partial", tmp_path / ".hf.other.1.replaced"]
    for path in left:
        path.mkdir()
    with files.writing_folder(tmp_path / "hf"):
        assert all(path.exists() for path in left)
    with files.writing_folder(tmp_path / "hf", sole_writer=True):
        assert not any(path.exists() for path in left)
    assert os.listdir(tmp_path) == ["hf"]
