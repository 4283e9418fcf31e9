"""Means over squares of patches in Triton, and how far values lie from them."""

import torch
import triton
import triton.language as tl

from sparsifiner import tuned
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops.program import Buffer, Draft
from sparsifiner.ops.triton_kernel import kernel, quotient


def square_means(
    draft: Draft,
    x: Buffer,
    layout: TokenLayout,
    side: int,
    other: Buffer | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Buffer:
    """As `TokenLayout.square_means`, prefix included in the input, for one or two tensors in one launch.

    Args:
        draft: what is written to.
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
    squares, block_d = layout.squares(side), max(16, triton.next_power_of_2(d))
    means = draft.empty(len(inputs), B, H, squares, d, dtype=dtype or x.dtype)
    draft.launch(
        square_means_kernel,
        (squares * B * H, len(inputs)),
        *(inputs[0], inputs[-1], means, *inputs[0].strides[:3], *inputs[-1].strides[:3]),
        *(B * H, H, *layout.grid, layout.prefix, side),
        HEAD_DIM=d,
        BLOCK_S=_members_of_a_step(layout, side, block_d),
        BLOCK_D=block_d,
        num_warps=1 if x.dtype.itemsize == 2 else 2,
    )
    return means


def window_statistics(
    draft: Draft, k: Buffer, v: Buffer, layout: TokenLayout, side: int
) -> tuple[Buffer, Buffer]:
    """Means of keys and values over windows, and how far each value lies from its window's, in one pass.

    Args:
        draft: what is written to.
        k: [B, H, N, d] with contiguous rows.
        v: likewise.
        layout: where the tokens lie.
        side: side of a window in patches.

    Returns:
        The means, [2, B, H, windows, d] in the dtype of `k`, and the log of each value's distance from its
        window's mean, fp32 [B, H, N], 0 for prefix tokens.
    """
    B, H, N, d = k.shape
    windows, channels = layout.squares(side), max(16, triton.next_power_of_2(d))
    means = draft.empty(2, B, H, windows, d, dtype=k.dtype)
    log_deviation = draft.empty(B, H, N, dtype=torch.float32)
    draft.launch(
        window_statistics_kernel,
        (windows * B * H,),
        *(k, v, means[0], means[1], log_deviation, *k.strides[:3], *v.strides[:3]),
        *(B * H, H, N, *layout.grid, layout.prefix, side),
        HEAD_DIM=d,
        BLOCK_S=_members_of_a_step(layout, side, channels),
        BLOCK_D=channels,
        num_warps=2 if k.dtype.itemsize == 2 else 4,
    )
    return means, log_deviation


def _members_of_a_step(layout: TokenLayout, side: int, block_d: int) -> int:
    """Patches of a square that a program takes at once: all of a small one, a fixed number of larger ones."""
    most = max(16, tuned.MEAN_ELEMENTS // block_d)
    return 16 if layout.square_patches(side) <= 16 else most


@kernel
def square_means_kernel(
    x,  # [B, H, N, d]
    y,  # [B, H, N, d]
    means,  # [inputs, B * H, squares, d]
    x_batch, x_head, x_token,
    y_batch, y_head, y_token,
    pairs, H, GRID_H, GRID_W, PREFIX, SIDE,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One square of one input; heads lie next to each other, as in the rows of one projection."""
    square, squares = tl.program_id(0) // pairs, tl.num_programs(0) // pairs
    pair = (tl.program_id(0) % pairs).to(tl.int64)
    which = tl.program_id(1)
    dim = tl.arange(0, BLOCK_D)
    if which == 0:
        x += pair // H * x_batch + pair % H * x_head
        mean = _square_mean(x, x_token, square, GRID_H, GRID_W, PREFIX, SIDE, HEAD_DIM, BLOCK_S, BLOCK_D)
    else:
        y += pair // H * y_batch + pair % H * y_head
        mean = _square_mean(y, y_token, square, GRID_H, GRID_W, PREFIX, SIDE, HEAD_DIM, BLOCK_S, BLOCK_D)
    to = means + ((which * pairs + pair) * squares + square) * HEAD_DIM + dim
    tl.store(to, mean.to(means.dtype.element_ty), mask=dim < HEAD_DIM)


@kernel
def window_statistics_kernel(
    k,  # [B, H, N, d]
    v,  # [B, H, N, d]
    mean_k,  # [B * H, windows, d]
    mean_v,  # [B * H, windows, d]
    log_deviation,  # fp32 [B * H, N]
    k_batch, k_head, k_token,
    v_batch, v_head, v_token,
    pairs, H, N, GRID_H, GRID_W, PREFIX, SIDE,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One window: its mean key and value, then the distance of each of its values from the mean."""
    window, windows = tl.program_id(0) // pairs, tl.num_programs(0) // pairs
    pair = (tl.program_id(0) % pairs).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    members = tl.minimum(SIDE, GRID_H) * SIDE
    columns = tl.cdiv(GRID_W, SIDE)
    height = tl.minimum(GRID_H - window // columns * SIDE, SIDE)
    width = tl.minimum(GRID_W - window % columns * SIDE, SIDE)
    k += pair // H * k_batch + pair % H * k_head
    v += pair // H * v_batch + pair % H * v_head
    log_deviation += pair * N
    total_k = tl.zeros([BLOCK_D], tl.float32)
    total_v = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, members, BLOCK_S):
        token, inside = _members(start, window, GRID_H, GRID_W, PREFIX, SIDE, BLOCK_S)
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        key = tl.load(k + token[:, None] * k_token + dim[None, :], mask=mask, other=0.0)
        value = tl.load(v + token[:, None] * v_token + dim[None, :], mask=mask, other=0.0)
        total_k += tl.sum(key.to(tl.float32), 0)
        total_v += tl.sum(value.to(tl.float32), 0)
    mean = total_v / (height * width)
    to = (pair * windows + window) * HEAD_DIM + dim
    tl.store(mean_k + to, (total_k / (height * width)).to(mean_k.dtype.element_ty), mask=dim < HEAD_DIM)
    tl.store(mean_v + to, mean.to(mean_v.dtype.element_ty), mask=dim < HEAD_DIM)
    for start in range(0, members, BLOCK_S):
        token, inside = _members(start, window, GRID_H, GRID_W, PREFIX, SIDE, BLOCK_S)
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        value = tl.load(v + token[:, None] * v_token + dim[None, :], mask=mask, other=0.0).to(tl.float32)
        distance = tl.where(mask, value - mean[None, :], 0.0)
        tl.store(log_deviation + token, 0.5 * tl.log(tl.sum(distance * distance, 1)), mask=inside)
    if window == 0:
        for start in range(0, PREFIX, BLOCK_S):
            token = start + tl.arange(0, BLOCK_S)
            tl.store(log_deviation + token, tl.zeros([BLOCK_S], tl.float32), mask=token < PREFIX)


@triton.jit
def _square_mean(
    x,
    x_token,
    square,
    GRID_H,
    GRID_W,
    PREFIX,
    SIDE,
    HEAD_DIM: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean of the rows of a head that lie in a square: fp32 [BLOCK_D]."""
    dim = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, tl.minimum(SIDE, GRID_H) * SIDE, BLOCK_S):
        token, inside = _members(start, square, GRID_H, GRID_W, PREFIX, SIDE, BLOCK_S)
        mask = inside[:, None] & (dim < HEAD_DIM)[None, :]
        row = tl.load(x + token[:, None] * x_token + dim[None, :], mask=mask, other=0.0)
        total += tl.sum(row.to(tl.float32), 0)
    columns = tl.cdiv(GRID_W, SIDE)
    height = tl.minimum(GRID_H - square // columns * SIDE, SIDE)
    width = tl.minimum(GRID_W - square % columns * SIDE, SIDE)
    return total / (height * width)


@triton.jit
def _members(start, square, GRID_H, GRID_W, PREFIX, SIDE, BLOCK_S: tl.constexpr):
    """Tokens, int64, of BLOCK_S members of a square, and which of them are there."""
    columns = tl.cdiv(GRID_W, SIDE)
    top, left = square // columns * SIDE, square % columns * SIDE
    member = start + tl.arange(0, BLOCK_S)
    down = quotient(member, SIDE)
    row, column = top + down, left + member - down * SIDE
    inside = (member < tl.minimum(SIDE, GRID_H) * SIDE) & (row < GRID_H) & (column < GRID_W)
    return (PREFIX + row * GRID_W + column).to(tl.int64), inside
