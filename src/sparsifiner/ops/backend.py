"""Which backends there are, and the one rule by which "auto" chooses."""

import functools
import logging
import os
from collections.abc import Mapping
from importlib.util import find_spec

import torch

from sparsifiner import tuned
from sparsifiner.backend_names import BACKENDS
from sparsifiner.ops import native

HAS_TRITON = find_spec("triton") is not None

_logger = logging.getLogger(__name__)


def resolve_backend(
    backend: str, op: str, device: torch.device, why_not: Mapping[str, str] | None = None
) -> str:
    """Turns "auto" into the best backend and checks an explicit one, which is never replaced.

    Args:
        backend: "auto" or one of `BACKENDS`.
        op: name of the operation.
        device: where the inputs are.
        why_not: why kernels of a backend do not take these inputs, as the end of a sentence.

    Raises:
        ValueError: `backend` is unknown, or does not run here, or does not take these inputs.
    """
    reasons = {name: reason for name, reason in (why_not or {}).items() if reason}
    if backend == "auto":
        best, reason = _best_backend(op, device, reasons)
        if not torch.compiler.is_compiling():  # compiled code cannot log
            _say_choice(op, best, device.type, reason)
        return best
    if backend not in BACKENDS:
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend={backend!r} is not available; choose one of {names}")
    if backend == "triton" and not runs_triton(device):
        raise ValueError(
            f"backend='triton' needs an NVIDIA GPU and the package triton, got tensors on {device}; "
            "move them with .cuda(), or use backend='auto'"
        )
    if backend == "cpu" and not runs_native(device):
        reason = native.why_not() or f"got tensors on {device}; move them with .cpu()"
        raise ValueError(f"backend='cpu' does not run here: {reason}, or use backend='auto'")
    if backend in reasons:
        raise ValueError(f"{op}: backend={backend!r} {reasons[backend]}; use backend='torch' or 'auto'")
    return backend


def _best_backend(op: str, device: torch.device, reasons: Mapping[str, str]) -> tuple[str, str]:
    """What "auto" takes for an operation, and why it is not the kernel that would be faster."""
    fastest, operations = tuned.FASTER.get(device.type, ("torch", frozenset()))
    runs = {"triton": HAS_TRITON, "cpu": runs_native(device)}.get(fastest, False)
    if not runs or op not in operations:
        return "torch", ""
    if fastest in reasons:
        return "torch", f", since '{fastest}' {reasons[fastest]}"
    return fastest, ""


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on a device; its interpreter runs them on the CPU, for tests."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return HAS_TRITON and (device.type == "cuda" or (interpreted and device.type == "cpu"))


def runs_native(device: torch.device) -> bool:
    """Whether the native kernels run on a device."""
    return device.type == "cpu" and _has_native()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_native() -> bool:
    return not native.why_not()


@functools.cache
def _say_choice(op: str, backend: str, device: str, reason: str) -> None:
    _logger.info("sparsifiner: %s: backend 'auto' uses '%s' on %s%s", op, backend, device, reason)
