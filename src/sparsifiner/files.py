"""Writing files so that they are never there in part, nor in the place of others."""

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
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
