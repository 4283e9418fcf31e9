"""Writing files so that they are never there in part."""

from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_aside(file: Path, write: Callable[[Path], Any]) -> None:
    """Has `write` write a file under another name in its folder, then renames it."""
    aside = file.with_name(f".{file.name}.unfinished")
    write(aside)
    aside.replace(file)
