"""Means over squares of patches in Triton, and how far values lie from them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsifiner import tuned
from sparsifiner.geometry.grid import TokenLayout


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
        BLOCK_S=min(max(1, tuned.MEAN_ELEMENTS // block_d), triton.next_power_of_2(rows * side)),
        BLOCK_D=block_d,
        num_warps=1 if x.element_size() == 2 else 2,
    )
    return means


def window_statistics(k: Tensor, v: Tensor, layout: TokenLayout, side: int) -> tuple[Tensor, Tensor]:
    """Means of keys and values over windows, and how far each value lies from its window's, in one pass.

    Args:
        k: [B, H, N, d] with contiguous rows.
        v: likewise.
        layout: where the tokens lie.
        side: side of a window in patches.

    Returns:
        The means, [2, B, H, windows, d] in the dtype of `k`, and the log of each value's distance from its
        window's mean, fp32 [B, H, N], 0 for prefix tokens.
    """
    B, H, N, d = k.shape
    windows, rows, block_d = (
        layout.squares(side),
        layout.square_shape(side)[0],
        max(16, triton.next_power_of_2(d)),
    )
    means = k.new_empty(2, B, H, windows, d)
    log_deviation = torch.empty(B, H, N, dtype=torch.float32, device=k.device)
    if B * H:
        window_statistics_kernel[(windows * B * H,)](
            *(k, v, means[0], means[1], log_deviation, *k.stride()[:3], *v.stride()[:3]),
            *(B * H, H, N, *layout.grid, layout.prefix),
            SIDE=side,
            ROWS=rows,
            HEAD_DIM=d,
            BLOCK_S=max(16, min(tuned.MEAN_ELEMENTS // block_d, triton.next_power_of_2(rows * side))),
            BLOCK_D=block_d,
            num_warps=2 if k.element_size() == 2 else 4,
        )
    return means, log_deviation


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


@triton.jit
def window_statistics_kernel(
    k,  # [B, H, N, d]
    v,  # [B, H, N, d]
    mean_k,  # [B * H, windows, d]
    mean_v,  # [B * H, windows, d]
    log_deviation,  # fp32 [B * H, N]
    k_batch, k_head, k_token,
    v_batch, v_head, v_token,
    pairs, H, N, GRID_H, GRID_W, PREFIX,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,  # of a whole window: its side, or that of the grid if that is smaller
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One window: its mean key and value, then the distance of each of its values from the mean."""
    window, windows = tl.program_id(0) // pairs, tl.num_programs(0) // pairs
    pair = (tl.program_id(0) % pairs).to(tl.int64)
    columns = tl.cdiv(GRID_W, SIDE)
    dim = tl.arange(0, BLOCK_D)
    height = tl.minimum(GRID_H - window // columns * SIDE, SIDE)
    width = tl.minimum(GRID_W - window % columns * SIDE, SIDE)
    first = PREFIX + window // columns * SIDE * GRID_W + window % columns * SIDE
    k += pair // H * k_batch + pair % H * k_head
    v += pair // H * v_batch + pair % H * v_head
    log_deviation += pair * N
    total_k = tl.zeros([BLOCK_D], tl.float32)
    total_v = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, ROWS * SIDE, BLOCK_S):
        token, inside = _members(start, first, height, width, GRID_W, SIDE, BLOCK_S)
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        key = tl.load(k + token[:, None] * k_token + dim[None, :], mask=mask, other=0.0)
        value = tl.load(v + token[:, None] * v_token + dim[None, :], mask=mask, other=0.0)
        total_k += tl.sum(key.to(tl.float32), 0)
        total_v += tl.sum(value.to(tl.float32), 0)
    mean = total_v / (height * width)
    to = (pair * windows + window) * HEAD_DIM + dim
    tl.store(mean_k + to, (total_k / (height * width)).to(mean_k.dtype.element_ty), mask=dim < HEAD_DIM)
    tl.store(mean_v + to, mean.to(mean_v.dtype.element_ty), mask=dim < HEAD_DIM)
    for start in range(0, ROWS * SIDE, BLOCK_S):
        token, inside = _members(start, first, height, width, GRID_W, SIDE, BLOCK_S)
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        value = tl.load(v + token[:, None] * v_token + dim[None, :], mask=mask, other=0.0).to(tl.float32)
        distance = tl.where(mask, value - mean[None, :], 0.0)
        tl.store(log_deviation + token, 0.5 * tl.log(tl.sum(distance * distance, 1)), mask=inside)
    if window == 0:
        for start in range(0, PREFIX, BLOCK_S):
            token = start + tl.arange(0, BLOCK_S)
            tl.store(log_deviation + token, tl.zeros([BLOCK_S], tl.float32), mask=token < PREFIX)


@triton.jit
def _members(start, first, height, width, GRID_W, SIDE: tl.constexpr, BLOCK_S: tl.constexpr):
    """Tokens, int64, of BLOCK_S members of a window, and which of them are there."""
    member = start + tl.arange(0, BLOCK_S)
    row, column = member // SIDE, member % SIDE
    return (first + row * GRID_W + column).to(tl.int64), (row < height) & (column < width)
