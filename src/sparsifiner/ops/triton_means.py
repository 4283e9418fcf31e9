"""Means over squares of patches in Triton: of queries over tiles, of keys and values over windows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsifiner.layout import TokenLayout


def square_means(
    x: Tensor,
    layout: TokenLayout,
    side: int,
    other: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """As `TokenLayout.square_means`, prefix included in the input, for one or two tensors in one launch.

    Args:
        x: [B, H, N, d] with contiguous rows.
        layout: where the tokens lie.
        side: side of a square in patches.
        other: a second tensor of the same shape and dtype, with contiguous rows.
        dtype: of the means, that of `x` by default; they are accumulated in fp32.

    Returns:
        [1 or 2, B, H, squares, d].
    """
    B, H, _, d = x.shape
    inputs = [x] if other is None else [x, other]
    means = x.new_empty(len(inputs), B, H, layout.squares(side), d, dtype=dtype or x.dtype)
    block_d = max(16, triton.next_power_of_2(d))
    rows = layout.square_shape(side)[0]
    square_means_kernel[(layout.squares(side) * B * H, len(inputs))](
        *(inputs[0], inputs[-1], means, *inputs[0].stride()[:3], *inputs[-1].stride()[:3]),
        *(B * H, H, *layout.grid, layout.prefix, d),
        SIDE=side,
        ROWS=rows,
        BLOCK_S=min(max(1, 4096 // block_d), triton.next_power_of_2(rows * side)),
        BLOCK_D=block_d,
        num_warps=1 if x.element_size() == 2 else 2,
    )
    return means


@triton.jit
def square_means_kernel(
    x,  # [B, H, N, d]
    y,  # [B, H, N, d]
    means,  # [inputs, B * H, squares, d]
    x_batch, x_head, x_token,
    y_batch, y_head, y_token,
    pairs, H, GRID_H, GRID_W, PREFIX, HEAD_DIM,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,  # of a whole square: its side, or that of the grid if that is smaller
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One square of one input; heads lie next to each other, as in the rows of one projection."""
    square, squares = tl.program_id(0) // pairs, tl.num_programs(0) // pairs
    pair = (tl.program_id(0) % pairs).to(tl.int64)
    which = tl.program_id(1)
    columns = tl.cdiv(GRID_W, SIDE)
    dim = tl.arange(0, BLOCK_D)
    height = tl.minimum(GRID_H - square // columns * SIDE, SIDE)
    width = tl.minimum(GRID_W - square % columns * SIDE, SIDE)
    first = PREFIX + square // columns * SIDE * GRID_W + square % columns * SIDE
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, ROWS * SIDE, BLOCK_S):
        member = start + tl.arange(0, BLOCK_S)
        row, column = member // SIDE, member % SIDE
        token = (first + row * GRID_W + column).to(tl.int64)
        mask = ((row < height) & (column < width))[:, None] & (dim < HEAD_DIM)[None, :]
        if which == 0:
            at = x + pair // H * x_batch + pair % H * x_head + token[:, None] * x_token + dim[None, :]
            total += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32), 0)
        else:
            at = y + pair // H * y_batch + pair % H * y_head + token[:, None] * y_token + dim[None, :]
            total += tl.sum(tl.load(at, mask=mask, other=0.0).to(tl.float32), 0)
    to = means + ((which * pairs + pair) * squares + square) * HEAD_DIM + dim
    tl.store(to, (total / (height * width)).to(means.dtype.element_ty), mask=dim < HEAD_DIM)
