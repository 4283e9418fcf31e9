"""Rows of measurements: where they come from, and files that keep them."""

import csv
import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from filelock import FileLock

from sparsifiner.config import SparsifyConfig, make_config
from sparsifiner.files import write_aside
from sparsifiner.scorers import SCORERS, ScorerOptions
from sparsifiner.tokens import TOKENS, TokenMethod

Row = dict[str, Any]


def provenance(device: torch.device | str) -> Row:
    """Device, versions and commit; COMMIT names it where there is no git, None where nothing does."""
    device = torch.device(device)
    cpu = f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"
    name = f"{cpu}, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else name,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "triton": version_of("triton"),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "commit": os.environ.get("COMMIT") or _commit(),
    }


def command_of(name: str, *groups: object) -> str:
    """The command line that measures this again: the options that are not the defaults.

    Args:
        name: words of the command.
        *groups: dataclasses whose fields are options.
    """
    words = ["sparsifiner", *name.split()]
    for group in groups:
        assert dataclasses.is_dataclass(group)
        # commands begin with a preset
        kind: Any = type(group)
        usual = make_config("fast") if kind is SparsifyConfig else kind()
        for field in dataclasses.fields(group):
            value = getattr(group, field.name)
            if value != getattr(usual, field.name):
                words += _words_of(field.name.replace("_", "-"), value)
    return shlex.join(words)


def _words_of(flag: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list | tuple):
        return [f"--{flag}", *(str(each) for each in value)]
    if value is None:
        return [f"--{flag}", "none"]
    if isinstance(value, ScorerOptions):
        return _words_of_choice(flag, SCORERS.name_of(value), value)
    if isinstance(value, TokenMethod):
        return _words_of_choice(flag, TOKENS.name_of(value), value)
    return [f"--{flag}", json.dumps(value) if isinstance(value, dict) else str(value)]


def _words_of_choice(flag: str, name: str, option: Any) -> list[str]:
    """The name, and the options that are not the defaults."""
    words = [f"--{flag}", name]
    for field in dataclasses.fields(option):
        value = getattr(option, field.name)
        if value != field.default:
            text = value if isinstance(value, str) else json.dumps(value)
            words += [f"--{flag}.{field.name.replace('_', '-')}", text]
    return words


def read_rows(file: Path) -> list[Row]:
    """The rows of a file, [] where there is none yet.

    Raises:
        ValueError: it holds something else.
    """
    if not file.exists():
        return []
    try:
        rows = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} cannot be read as rows of measurements ({error}); move it away") from error
    if not isinstance(rows, list):
        raise ValueError(f"{file} holds no list of rows of measurements; move it away")
    return rows


def append_rows(file: Path, rows: list[Row]) -> list[Row]:
    """Adds rows to a JSON list, as `changing_rows` does.

    Returns:
        All rows of the file.
    """
    with changing_rows(file) as every:
        every += rows
    return every


@contextmanager
def changing_rows(file: Path) -> Iterator[list[Row]]:
    """Lends the rows of a JSON list to change them in place, then writes them, aside and renamed.

    Other processes that change the file wait meanwhile, so that nobody's rows are lost.

    Raises:
        ValueError: see `read_rows`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_name(f".{file.name}.lock")):
        rows = read_rows(file)
        yield rows
        text = json.dumps(rows, indent=1) + "\n"
        write_aside(file, lambda aside: aside.write_text(text))


def write_csv(file: Path, rows: list[Row]) -> None:
    """Writes rows as a table, one column for every key that any of them has; lists are written as JSON."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def write(aside: Path) -> None:
        with aside.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            for row in rows:
                nested = {key: json.dumps(each) for key, each in row.items() if isinstance(each, list | dict)}
                writer.writerow(row | nested)

    write_aside(file, write)


def version_of(package: str) -> str | None:
    """The version of an installed package, None where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this code, if git keeps it."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:
        # an environment may lie inside of another repository
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        head = [*git, "rev-parse", "--short", "HEAD"]
        return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
