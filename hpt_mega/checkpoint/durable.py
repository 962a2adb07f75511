"""What has to be on the disk before something older is removed for it, so that a power cut undoes neither."""

from __future__ import annotations

import errno
import os
from pathlib import Path


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
    """sync() of a folder and of all in it."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
