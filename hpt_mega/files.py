"""Files and folders that are whole whenever they exist, whatever ends the writing, a power cut too.

A folder whose making goes on where it was killed is checkpoint/journal.py.
"""

from __future__ import annotations

import errno
import glob
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def writing_file(out: Path) -> Iterator[TextIO]:
    """A file to fill, in UTF-8, which takes the place of `out` once the block ends without an error.

    Processes of several hosts may write one file at once.
    """
    aside = _aside(out)
    try:
        with aside.open("w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


def write_atomically(out: Path, text: str) -> None:
    """Write a file as writing_file does."""
    with writing_file(out) as file:
        file.write(text)


@contextmanager
def writing_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `out` once the block ends without an error."""
    _remove_leftovers(out)
    aside = _aside(out)
    aside.mkdir(parents=True)
    try:
        yield aside
        sync_tree(aside)
        shutil.rmtree(out, ignore_errors=True)
        aside.rename(out)
        sync(out.absolute().parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network filesystems have no such call for folders
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """sync() of a folder and of all in it, to be done before something older is removed for it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.{platform.node()}.{os.getpid()}.partial")


def _remove_leftovers(out: Path) -> None:
    """Remove what processes of this host that were killed have left of the folder."""
    for aside in out.parent.glob(f".{glob.escape(out.name)}.{glob.escape(platform.node())}.*.partial"):
        pid = aside.name.split(".")[-2]
        if pid == str(os.getpid()) or not Path("/proc", pid).exists():
            shutil.rmtree(aside, ignore_errors=True)
