"""The seal of a checkpoint: which run wrote it, where it stood, and whether its files are as they were."""

import hashlib
import json
import os
import re
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sparsifiner.files import sync

# in every checkpoint: who wrote it, and size and digest of every file
_MARK = "run.txt"
_MANIFEST = "manifest.json"
_MARK_TEXT = re.compile(r"([0-9a-f]{32}) (\d+-\d+)")
# what a checkpoint of a version without manifests holds at least
_NEEDED = ("model.safetensors", "optimizer.bin", "progress.pt")


def seal(folder: Path, run: str, name: str) -> None:
    """Writes the mark and, when all else is on the disk, the manifest of a checkpoint.

    Args:
        folder: of the checkpoint.
        run: the run that wrote it, 32 hexadecimal digits.
        name: that the folder will have.
    """
    (folder / _MARK).write_text(f"{run} {name}")
    files = {}
    for file in sorted(folder.iterdir()):
        if file.name != _MANIFEST:
            sync(file)
            files[file.name] = _fingerprint(file)
    manifest = folder / _MANIFEST
    manifest.write_bytes(_manifest_text({"run": run, "name": name, "files": files}))
    sync(manifest)
    sync(folder)


def mark_of(checkpoint: Path) -> tuple[str, str] | None:
    """Run and name that a checkpoint was written by and under, None where nothing in it tells.

    Manifest and mark tell both, so that damage of one leaves the other.
    """
    manifest = _manifest_of(checkpoint)
    if manifest is not None:
        return manifest["run"], manifest["name"]
    try:
        found = _MARK_TEXT.fullmatch((checkpoint / _MARK).read_text())
    except (OSError, UnicodeDecodeError):
        return None
    return None if found is None else (found[1], found[2])


def sealed_names(checkpoint: Path) -> set[str]:
    """Names of the files that were written into a checkpoint, as far as its manifest is intact."""
    manifest = _manifest_of(checkpoint)
    return set() if manifest is None else {_MANIFEST, *manifest["files"]}


def find_damage(checkpoint: Path) -> str | None:
    """Which file of a checkpoint is damaged, and how, None where all are intact.

    A checkpoint that has neither manifest nor mark is of a version that wrote none: it is as good as the
    formats of its files can tell, of which safetensors has no digest of the tensors.
    """
    manifest = _manifest_of(checkpoint)
    if manifest is None:
        there = [name for name in (_MANIFEST, _MARK) if os.path.lexists(checkpoint / name)]
        if not there:
            return _find_unreadable(checkpoint)
        return f"{_MANIFEST} {'has changed since it was written' if _MANIFEST in there else 'is missing'}"
    if manifest["name"] != checkpoint.name:
        return f"{_MANIFEST} is that of {manifest['name']}"
    changes = (_find_change(checkpoint / name, expected) for name, expected in manifest["files"].items())
    return next((change for change in changes if change is not None), None)


def _find_change(file: Path, expected: dict[str, Any]) -> str | None:
    """What is wrong with a file of which size and digest are known."""
    try:
        found = _fingerprint(file)
    except FileNotFoundError:
        return f"{file.name} is missing"
    except OSError as error:
        return f"{file.name} cannot be read ({error.strerror})"
    if found["bytes"] != expected["bytes"]:
        return f"{file.name} has {found['bytes']} bytes instead of {expected['bytes']}"
    return None if found == expected else f"{file.name} has changed since it was written"


def _find_unreadable(checkpoint: Path) -> str | None:
    """Which file of a checkpoint without a manifest its format refuses."""
    for name in _NEEDED:
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    for file in sorted(checkpoint.iterdir()):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix in {".bin", ".pt", ".pkl"}:
                with zipfile.ZipFile(file) as archive:
                    member = archive.testzip()
                if member is not None:
                    return f"{file.name} has changed since it was written, at {member}"
        # a damaged header may ask of zipfile what it does not do
        except (
            SafetensorError, OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, struct.error,
            zlib.error,
        ) as error:  # fmt: skip
            return f"{file.name} cannot be read ({error})"
    return None


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return {"bytes": stream.tell(), "sha256": digest}


def _manifest_text(manifest: dict[str, Any]) -> bytes:
    """A manifest and its own digest."""
    digest = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**manifest, "sha256": digest}, indent=1, sort_keys=True) + "\n").encode()


def _manifest_of(checkpoint: Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, None where it is missing or damaged."""
    try:
        content = (checkpoint / _MANIFEST).read_bytes()
        manifest = json.loads(content)
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict):
        return None
    manifest.pop("sha256", None)
    # equal to the byte: nothing in it can change unseen
    return manifest if _manifest_text(manifest) == content else None
