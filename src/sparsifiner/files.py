"""Writing files so that they are never there in part, nor in the place of others."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4


def check_absent(file: Path) -> None:
    """Keeps what is there from being overwritten.

    Raises:
        FileExistsError: there is such a file.
    """
    if file.exists():
        raise FileExistsError(f"path={str(file)!r} exists; remove it, or give another name")


def write_aside(file: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` write a file under a name of its own in the same folder, then renames it."""
    # two writers of one file must not write into each other's
    aside = file.with_name(f".{file.name}.{uuid4().hex}.unfinished")
    try:
        write(aside)
        sync(aside)  # a name must not reach the disk before what it names
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    if os.name == "nt":  # which flushes neither folders nor files that are open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems cannot
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:
            raise
    finally:
        os.close(descriptor)
