"""Files and folders that are whole whenever they exist, whatever ends the writing, a power cut too.

A folder whose making goes on where it was killed is checkpoint/journal.py.
"""

from __future__ import annotations

import errno
import glob
import os
import platform
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TextIO

OUTPUT_OF_JOBS = ("*.out", "*.err", "*.log")  # what a scheduler or `tee` may have put into a folder
_NEW, _OLD = ".partial", ".replaced"


@contextmanager
def writing_file(out: Path) -> Iterator[TextIO]:
    """A file to fill, in UTF-8, which takes the place of `out` once the block ends without an error.

    Processes of several hosts may write one file at once.
    """
    aside = _aside(out)
    try:
        with _opened(aside, out) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)


def _opened(aside: Path, out: Path) -> TextIO:
    """Raises OSError that names `out`, the file that was asked for."""
    try:
        return aside.open("w", encoding="utf-8")
    except OSError as error:
        error.filename = str(out)
        raise


def write_atomically(out: Path, text: str) -> None:
    """Write a file as writing_file does."""
    with writing_file(out) as file:
        file.write(text)


def strangers(folder: Path, own: Collection[str]) -> list[str]:
    """What lies in a folder that exists and none of the patterns `own` means; hidden files do not count."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    return [name for name in names if not any(fnmatchcase(name, pattern) for pattern in own)]


@contextmanager
def writing_folder(out: Path, *, sole_writer: bool = False) -> Iterator[Path]:
    """A folder to fill, which takes the place of `out` once the block ends without an error.

    It is a sibling of `out`. An old folder of that name is moved aside for it and removed last: where a kill
    comes in between, the next writing puts it back. Of several processes that write one folder at once the
    last one's stays, or it fails. What kills have left goes first, `sole_writer`: that of other hosts too.
    """
    _remove_leftovers(out, sole_writer)
    aside, old = _aside(out), _aside(out, _OLD)
    aside.mkdir(parents=True)
    try:
        yield aside
        sync_tree(aside)
        if out.is_dir() and not out.is_symlink():
            with suppress(FileNotFoundError):  # another process has moved it
                out.rename(old)
        aside.rename(out)
        sync(out.absolute().parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        _remove_old(old, out)


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


def _aside(out: Path, kind: str = _NEW) -> Path:
    return out.with_name(f".{out.name}.{platform.node()}.{os.getpid()}{kind}")


def _remove_leftovers(out: Path, sole_writer: bool) -> None:
    """Remove what processes that were killed have left of the folder; on other hosts they may be alive."""
    for kind in (_NEW, _OLD):
        for left in out.parent.glob(f".{glob.escape(out.name)}.*{kind}"):
            host, _, pid = left.name[len(out.name) + 2 : -len(kind)].rpartition(".")
            alive = pid != str(os.getpid()) and Path("/proc", pid).exists()
            if not alive if host == platform.node() else sole_writer:
                _remove_old(left, out) if kind == _OLD else shutil.rmtree(left, ignore_errors=True)


def _remove_old(old: Path, out: Path) -> None:
    """Remove a folder that was moved aside; put it back where none has taken its place."""
    if old.is_dir() and not out.exists():
        with suppress(OSError):  # one has, this very moment
            old.rename(out)
    shutil.rmtree(old, ignore_errors=True)
