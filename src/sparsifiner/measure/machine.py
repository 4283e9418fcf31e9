"""What this machine has: versions, devices, and which backends run on it or why not."""

import platform
from pathlib import Path
from typing import Any

import timm
import torch

from sparsifiner.measure.records import version_of
from sparsifiner.ops import native
from sparsifiner.ops.backends import runs_triton
from sparsifiner.version import __version__


def describe_machine() -> dict[str, Any]:
    """Versions, devices and backends, as JSON takes them.

    Returns:
        `versions` of packages, None for one that is not installed; `cpu`, its `name` and `threads`; `gpus`,
        their names; `backends`, each with `runs`, `brings` and, where it does not run, `reason`;
        `isa`, the instruction set of the native CPU kernels, "none" without any.

    Raises:
        ValueError: SPARSIFINER_ISA asks for what this machine does not have.
    """
    return {
        "versions": {
            "sparsifiner": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "triton": version_of("triton"),
        },
        "cpu": {"name": _cpu_name(), "threads": torch.get_num_threads()},
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "backends": {
            "reference": _backend("the specification: dense attention with a mask"),
            "torch": _backend("gathers of torch's own operations, on any device"),
            "cpu": _backend("native kernels for x86-64 CPUs", native.why_not()),
            "triton": _backend("fused kernels for NVIDIA GPUs", _why_no_triton()),
        },
        "isa": native.best_isa().name.lower(),
    }


def _backend(brings: str, reason: str = "") -> dict[str, Any]:
    return {"runs": not reason, "brings": brings} | ({"reason": reason} if reason else {})


def _why_no_triton() -> str:
    if runs_triton(torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        return ""
    if version_of("triton") is None:
        return "the package triton is not installed; it comes with torch's builds for CUDA on Linux"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; install a build with it"
    return "no NVIDIA GPU was found; it needs one and its driver"


def _cpu_name() -> str:
    """The processor's name, as its maker gave it where the system tells."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(errors="replace").splitlines() if listing.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
