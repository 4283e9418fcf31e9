"""Which backends there are, and the one rule by which "auto" chooses."""

import functools
import logging
import os
from importlib.util import find_spec

import torch

BACKENDS = ("reference", "torch", "triton")
HAS_TRITON = find_spec("triton") is not None

# Kernels that were measured to be faster on a GPU than operations of torch: "auto" takes these.
_FASTER_IN_TRITON = frozenset({"select_topk"})

_logger = logging.getLogger(__name__)


def resolve_backend(backend: str, op: str, device: torch.device, *, kernel_fits: bool = True) -> str:
    """Turns "auto" into the best backend and checks an explicit one, which is never replaced.

    Args:
        backend: "auto" or one of `BACKENDS`.
        op: name of the operation.
        device: where the inputs are.
        kernel_fits: whether a Triton kernel takes these inputs.

    Raises:
        ValueError: `backend` is unknown, or does not run here.
    """
    if backend == "auto":
        best = _best_backend(op, device) if kernel_fits else "torch"
        if not torch.compiler.is_compiling():  # compiled code cannot log
            _say_choice(op, best, device.type)
        return best
    if backend not in BACKENDS:
        names = ", ".join(repr(name) for name in ("auto", *BACKENDS))
        raise ValueError(f"backend={backend!r} is not available; choose one of {names}")
    if backend == "triton" and not runs_triton(device):
        raise ValueError(
            f"backend='triton' needs an NVIDIA GPU and the package triton, got tensors on {device}; "
            "move them with .cuda(), or use backend='auto'"
        )
    return backend


def _best_backend(op: str, device: torch.device) -> str:
    """What "auto" takes for an operation."""
    return "triton" if HAS_TRITON and device.type == "cuda" and op in _FASTER_IN_TRITON else "torch"


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on a device; its interpreter runs them on the CPU, for tests."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return HAS_TRITON and (device.type == "cuda" or (interpreted and device.type == "cpu"))


@functools.cache
def _say_choice(op: str, backend: str, device: str) -> None:
    _logger.info("sparsifiner: %s: backend 'auto' uses '%s' on %s", op, backend, device)
