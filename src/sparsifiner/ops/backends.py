"""The table of backends: where each runs, which inputs it takes, and the one rule by which "auto" chooses."""

import functools
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import MappingProxyType

import torch
from torch import Tensor

from sparsifiner import tuned
from sparsifiner.backend_names import BACKENDS
from sparsifiner.ops import native

HAS_TRITON = find_spec("triton") is not None

_NO_LIMIT = 2**20
_SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_STEP = native.HEAD_DIM_STEP

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """One way to compute the operations.

    Attributes:
        why_not_on: why it does not run on a device, with a remedy; empty where it does.
        dtypes: that its kernels take; None for all.
        head_dims: that its kernels take, None for all.
        limits: the largest of each size that its kernels take, and what that is the number of.
    """

    why_not_on: Callable[[torch.device], str] = lambda device: ""
    dtypes: frozenset[torch.dtype] | None = None
    head_dims: range | None = None
    limits: Mapping[str, tuple[int, str]] = field(default_factory=dict)

    def why_not(self, dtype: torch.dtype, head_dim: int, sizes: Mapping[str, int]) -> str:
        """Why its kernels do not take inputs, as the end of a sentence; empty if they do.

        Args:
            dtype: of q, k and v.
            head_dim: d.
            sizes: others of the inputs, by the names of `limits`.
        """
        if self.dtypes is not None and dtype not in self.dtypes:
            *others, last = (_SHORT[dtype] for dtype in _SHORT if dtype in self.dtypes)
            return f"takes {', '.join(others)} and {last}, got {_SHORT.get(dtype, dtype)}"
        if self.head_dims is not None and head_dim not in self.head_dims:
            step, largest = self.head_dims.step, self.head_dims[-1]
            bound = f" up to {largest}" if largest < _NO_LIMIT else ""
            return f"takes head dims that are multiples of {step}{bound}, got {head_dim}"
        for name, size in sizes.items():
            largest, counted = self.limits.get(name, (size, ""))
            if size > largest:
                return f"takes at most {largest} {counted}, got {size}"
        return ""


def _why_not_triton(device: torch.device) -> str:
    # its interpreter runs kernels on the CPU, for tests
    if HAS_TRITON and (device.type == "cuda" or (device.type == "cpu" and _is_interpreted())):
        return ""
    return f"needs an NVIDIA GPU and the package triton, got tensors on {device}; move them with .cuda()"


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_native(device: torch.device) -> str:
    if device.type == "cpu" and _has_native():
        return ""
    return f"does not run here: {native.why_not() or f'got tensors on {device}; move them with .cpu()'}"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_native() -> bool:
    return not native.why_not()


# What a launch's second axis takes, a program counts, and programs hold in registers.
_TRITON_LIMITS = {
    "pairs": (65_535, "heads in a batch"),
    "windows": (4_096, "summary windows"),
    "scored_keys": (16_384, "keys with low-rank scores"),
    "basis_elements": (64 * 64, "elements of a basis, its size times the head dim"),
    "reduced_dim": (32, "reduced channels"),
}
TABLE = {
    "reference": Backend(),
    "torch": Backend(),
    "cpu": Backend(_why_not_native, frozenset(native.DTYPES), range(_STEP, _NO_LIMIT + 1, _STEP)),
    "triton": Backend(
        _why_not_triton,
        frozenset({torch.float32, torch.bfloat16, torch.float16}),
        range(8, 128 + 1, 8),
        _TRITON_LIMITS,
    ),
}
assert tuple(TABLE) == BACKENDS


def resolve_backend(
    backend: str,
    op: str,
    device: torch.device,
    q: Tensor | None = None,
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> str:
    """Turns "auto" into the best backend and checks an explicit one, which is never replaced.

    Args:
        backend: "auto" or one of `BACKENDS`.
        op: name of the operation.
        device: where the inputs are.
        q: [B, H, N, d] queries; None where there are none, and every input is taken.
        sizes: see `Backend.why_not`.

    Raises:
        ValueError: `backend` is unknown, or does not run here, or does not take these inputs.
    """
    if backend == "auto":
        best, reason = _best_backend(op, device, q, sizes)
        if not torch.compiler.is_compiling():  # compiled code cannot log
            _say_choice(op, best, device.type, reason)
        return best
    if backend not in TABLE:
        names = ", ".join(repr(name) for name in ("auto", *TABLE))
        raise ValueError(f"backend={backend!r} is not available; choose one of {names}")
    asked = TABLE[backend]
    if reason := asked.why_not_on(device):
        raise ValueError(f"backend={backend!r} {reason}, or use backend='auto'")
    if q is not None and (reason := asked.why_not(q.dtype, q.shape[-1], _with_pairs(q, sizes))):
        raise ValueError(f"{op}: backend={backend!r} {reason}; use backend='torch' or 'auto'")
    return backend


def takes(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int, sizes: Mapping[str, int]
) -> bool:
    """Whether a backend runs on a device and its kernels take such inputs; see `Backend.why_not`."""
    backend = TABLE[name]
    return not backend.why_not_on(device) and not backend.why_not(dtype, head_dim, sizes)


def _with_pairs(q: Tensor, sizes: Mapping[str, int]) -> dict[str, int]:
    return {"pairs": q.shape[0] * q.shape[1], **sizes}


def _best_backend(
    op: str, device: torch.device, q: Tensor | None, sizes: Mapping[str, int]
) -> tuple[str, str]:
    """What "auto" takes for an operation, and why it is not the kernel that would be faster."""
    fastest, operations = tuned.FASTER.get(device.type, ("torch", frozenset()))
    backend = TABLE[fastest]
    if op not in operations or backend.why_not_on(device):
        return "torch", ""
    if q is not None and (reason := backend.why_not(q.dtype, q.shape[-1], _with_pairs(q, sizes))):
        return "torch", f", since '{fastest}' {reason}"
    return fastest, ""


def runs_triton(device: torch.device) -> bool:
    """Whether Triton kernels run on a device."""
    return not _why_not_triton(device)


@functools.cache
def _say_choice(op: str, backend: str, device: str, reason: str) -> None:
    _logger.info("sparsifiner: %s: backend 'auto' uses '%s' on %s%s", op, backend, device, reason)
