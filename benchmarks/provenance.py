"""Where a figure comes from: device, versions, commit; and the files that figures are kept in."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch

RESULTS = Path(__file__).parents[1] / "docs" / "results"


def provenance(device: str) -> dict[str, Any]:
    """Device, library versions and commit; COMMIT names it where there is no git."""
    cpu = f"{platform.machine()} CPU with {torch.backends.cpu.get_cpu_capability()}"
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu}, {torch.get_num_threads()} threads"
    commit = (
        os.environ.get("COMMIT")
        or subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    )
    return {
        "device": name,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "commit": commit,
    }


def append_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Adds rows to a JSON list, written aside and renamed, so that nothing is lost half-way."""
    before = json.loads(file.read_text()) if file.exists() else []
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".tmp")
    aside.write_text(json.dumps(before + rows, indent=1) + "\n")
    aside.rename(file)
