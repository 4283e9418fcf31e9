"""What kernels take, and where they are launched."""

import contextlib

import torch
from torch import Tensor

from sparsifiner.ops import native

LARGEST_HEAD_DIM = 128
# Batch elements times heads: they take the second axis of a launch.
LARGEST_PAIRS = 65_535


def why_no_kernel(backend: str, q: Tensor) -> str:
    """Why kernels of "triton" or "cpu" do not take queries [B, H, N, d]; empty if they do."""
    if backend == "cpu":
        return _why_no_cpu_kernel(q)
    if q.dtype == torch.float64:
        return "computes in fp32, got fp64"
    if q.shape[-1] % 8 or q.shape[-1] > LARGEST_HEAD_DIM:
        return f"takes head dims that are multiples of 8 up to {LARGEST_HEAD_DIM}, got {q.shape[-1]}"
    if q.shape[0] * q.shape[1] > LARGEST_PAIRS:
        return f"takes at most {LARGEST_PAIRS} heads in a batch, got {q.shape[0]} x {q.shape[1]}"
    return ""


def _why_no_cpu_kernel(q: Tensor) -> str:
    if q.dtype not in native.DTYPES:
        return f"takes fp32 and bf16, got {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] % native.HEAD_DIM_STEP or not q.shape[-1]:
        return f"takes head dims that are multiples of {native.HEAD_DIM_STEP}, got {q.shape[-1]}"
    return ""


def device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, which need not be that of the inputs."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
