"""The measurements of a run: a file of one JSON object a line."""

import json
import logging
from pathlib import Path
from typing import Any

from sparsifiner.files import write_aside
from sparsifiner.training.checkpoints import Position

_logger = logging.getLogger(__name__)

# what every record has, and what is in those of one kind only; all else are numbers
_TYPES = {"kind": str, "stage": str, "stage_index": int, "step": int}
_NUMBERS = {"train": {"epoch"}, "validation": {"epoch", "top1"}}


def read_records(file: Path) -> list[dict[str, Any]]:
    """All records of a file, [] where there is none; damaged lines are left out."""
    return [record for record in map(_parse, _lines(file)) if record is not None]


def forget_after(file: Path, position: Position) -> None:
    """Drops records behind a position: they are made again, and equal.

    A damaged line stays as it is, for what it held is not known, and a warning names it; a last line without
    its end goes: the run was killed while it wrote it.
    """
    if not file.exists():
        return
    kept = []
    for number, line in enumerate(_lines(file), 1):
        record = _parse(line)
        if record is not None:
            if Position(record["stage_index"], record["step"]) <= position:
                kept.append(line.removesuffix(b"\n") + b"\n")
        elif line.endswith(b"\n"):
            _logger.warning(
                "sparsifiner: line %d of %s is damaged; it stays as it is, and the report goes without it",
                number,
                file,
            )
            kept.append(line)
    write_aside(file, lambda aside: aside.write_bytes(b"".join(kept)))


def _lines(file: Path) -> list[bytes]:
    """Lines with their ends; a last one may have none."""
    if not file.exists():
        return []
    *lines, rest = file.read_bytes().split(b"\n")
    return [line + b"\n" for line in lines] + ([rest] if rest else [])


def _parse(line: bytes) -> dict[str, Any] | None:
    """The record of a line, None where it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:  # no JSON, or no text
        return None
    if not isinstance(record, dict) or not _TYPES.keys() <= record.keys():
        return None
    if not all(isinstance(value, _TYPES.get(name, (int, float))) for name, value in record.items()):
        return None
    kind = record["kind"]
    return record if kind in _NUMBERS and _NUMBERS[kind] <= record.keys() else None
