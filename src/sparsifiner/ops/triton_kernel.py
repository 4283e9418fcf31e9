"""How kernels are compiled, and the ones that every operation may need."""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from sparsifiner.ops.program import Buffer, Draft

# Numbers that differ from image size to image size. A kernel that is compiled for one of them being 1, or a
# multiple of 16, would be compiled again for other sizes; strides of tokens and heads are alike in all.
_SIZES = (
    *("H", "N", "GRID_H", "GRID_W", "PREFIX", "SQUARES_H", "SQUARES_W", "TILES_W", "SIDE", "SUMMARY_SIDE"),
    *("pairs", "squares", "windows", "tiles", "tokens", "rows", "total", "size", "part", "parts", "splits"),
    *("keys", "entries", "first_pair", "first_row", "budget", "m", "forced", "K", "c", "elements", "limit"),
)

# Elements that one program fills.
_FILLED = 4096


def kernel(function: Callable[..., Any]) -> Any:
    """A kernel in Triton that is compiled once for all image sizes, as far as its constants are alike."""
    parameters = inspect.signature(function).parameters.items()
    sizes = [name for name, each in parameters if name in _SIZES and each.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=sizes)


@triton.jit
def quotient(x, divisor):
    """x // divisor of numbers in a square or a grid, x from 0 to less than 2 ** 21.

    An integer division takes some thirty instructions where the divisor is no constant of the kernel. Half of
    one divisor is further from a whole number than fp32 rounds.
    """
    return ((x.to(tl.float32) + 0.5) * (1.0 / divisor)).to(tl.int32)


def fill(draft: Draft, x: Buffer, value: int) -> None:
    """Sets every element of whole memory."""
    draft.launch(fill_kernel, (triton.cdiv(x.elements, _FILLED),), x, x.elements, VALUE=value, BLOCK=_FILLED)


@kernel
def fill_kernel(
    x,  # of `elements`
    elements,
    VALUE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of x."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.full([BLOCK], VALUE, x.dtype.element_ty), mask=at < elements)
