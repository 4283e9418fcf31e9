"""Writing files so that they are never there in part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4


def write_aside(file: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` write a file under a name of its own in the same folder, then renames it."""
    # two writers of one file must not write into each other's
    aside = file.with_name(f".{file.name}.{uuid4().hex}.unfinished")
    try:
        write(aside)
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
