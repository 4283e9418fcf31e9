"""Scores of tiles, pooled or by impact, and the selection from them, in Triton."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsifiner import tuned
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops.select.triton_backend import OwnTokens, launch_select, padded_length
from sparsifiner.ops.triton_means import square_means, window_statistics

# As many scores exist at once as `tuned.SCORE_BYTES` hold, or about those of q, which the output needs later.
_SCRATCH_SHARE = 9 / 8
# Windows, or prefix keys, that one step of a program takes.
_BLOCK_W = 32


class TileQueries(NamedTuple):
    """What scores the keys for a tile: the mean queries of the squares that it is cut into.

    Attributes:
        mean_q: [B, H, squares, d].
        layout: where the tokens lie.
        tile: side of a tile in patches.
        pool: side of the squares.
        scale: factor of the products.
        log_mass: fp32 [B, H, squares], subtracted from a square's products; None for nothing.
        log_deviation: fp32 [B, H, N], added to every score of a key; None for nothing.
    """

    mean_q: Tensor
    layout: TokenLayout
    tile: int
    pool: int
    scale: float = 1.0
    log_mass: Tensor | None = None
    log_deviation: Tensor | None = None


def select_pooled(
    q: Tensor,
    k: Tensor,
    layout: TokenLayout,
    tile: int,
    budget: int,
    forced: int,
    scores: Tensor | None = None,
) -> Tensor:
    """Lists of the keys with the largest products with the mean query of a tile.

    Scores are fp32 for fp32 inputs and rounded to bf16 for 16-bit ones, whose products they are.

    Args:
        q: [B, H, N, d] queries, fp32, bf16 or fp16; strided views will do.
        k: [B, H, N, d] keys.
        layout: where the tokens lie.
        tile: side of a tile in patches.
        budget: list length.
        forced: the first keys, in every list.
        scores: [B, H, rows, N - forced] to write the scores of the other keys to, for tests.

    Returns:
        int32 [B, H, rows, budget], ascending, -1 last.
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    queries = TileQueries(square_means(q, layout, tile)[0], layout, tile, tile)
    return _select(queries, k, budget, forced, torch.bfloat16, scores)


def select_impact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: TokenLayout,
    tile: int,
    pool: int,
    summary: int,
    scale: float,
    budget: int,
    forced: int,
    scores: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lists by the scores of `sparsifiner.scorers.ImpactScorer`.

    Scores are fp32 for fp32 inputs and rounded to fp16 for 16-bit ones: logarithms need precision, not range.

    Args:
        q: [B, H, N, d] queries, fp32, bf16 or fp16; strided views will do.
        k: [B, H, N, d] keys.
        v: [B, H, N, d] values.
        layout: where the tokens lie.
        tile: side of a tile in patches.
        pool: side of the squares whose mean queries score.
        summary: side of the windows.
        scale: factor of the logits.
        budget: list length.
        forced: the first keys, in every list.
        scores: [B, H, rows, N - forced] to write the scores of the other keys to, for tests.

    Returns:
        int32 [B, H, rows, budget], ascending, -1 last, and the means of keys and values over the windows,
        [2, B, H, windows, d].
    """
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    mean_q = square_means(q, layout, pool)[0]
    means, log_deviation = window_statistics(k, v, layout, summary)
    log_mass = None if pool == tile else _log_mass(mean_q, k, means[0], layout, summary, scale)
    queries = TileQueries(mean_q, layout, tile, pool, scale, log_mass, log_deviation)
    return _select(queries, k, budget, forced, torch.float16, scores), means


def _log_mass(
    mean_q: Tensor, k: Tensor, mean_k: Tensor, layout: TokenLayout, summary: int, scale: float
) -> Tensor:
    """Log of a mean query's softmax denominator over prefix keys and windows: fp32 [B, H, squares]."""
    B, H, squares, d = mean_q.shape
    log_mass = torch.empty(B, H, squares, dtype=torch.float32, device=k.device)
    block_r = max(16, min(64, triton.next_power_of_2(squares)))
    if B * H:
        log_mass_kernel[(triton.cdiv(squares, block_r), B * H)](
            *(mean_q, k, mean_k, log_mass, *k.stride()[:3]),
            *(H, squares, *layout.grid, layout.prefix, mean_k.shape[2], scale),
            SIDE=summary,
            HEAD_DIM=d,
            BLOCK_R=block_r,
            BLOCK_W=_BLOCK_W,
            BLOCK_D=max(16, triton.next_power_of_2(d)),
        )
    return log_mass


def _select(
    queries: TileQueries, k: Tensor, budget: int, forced: int, short_dtype: torch.dtype, scores: Tensor | None
) -> Tensor:
    """Lists of the best keys, chunk by chunk of rows, so that scores do not exist whole."""
    k = k[:, :, forced:]
    B, H, N, d = k.shape
    layout, tile = queries.layout, queries.tile
    rows, pairs = layout.squares(tile), B * H
    indices = torch.empty(B, H, rows, budget, dtype=torch.int32, device=k.device)
    if not pairs:
        return indices
    stride = padded_length(N)
    dtype = torch.float32 if k.dtype == torch.float32 else short_dtype
    query_bytes = pairs * layout.tokens * d * k.element_size()
    chunk = max(1, scratch_rows(query_bytes, stride * dtype.itemsize))
    # whole heads where they fit, else parts of one; alike in size, since small launches leave the GPU idle
    heads = triton.cdiv(pairs, triton.cdiv(pairs, max(1, chunk // rows)))
    part = triton.cdiv(rows, triton.cdiv(rows, chunk))
    own = OwnTokens(layout=layout, side=tile)
    scratch = torch.empty(heads * part, stride, dtype=dtype, device=k.device)
    largest = tuned.TILE_SCORES_FP32 if dtype == torch.float32 else tuned.TILE_SCORES
    block_t, block_n = max(16, min(largest[0], triton.next_power_of_2(part))), largest[1]
    deviation = None if queries.log_deviation is None else queries.log_deviation[:, :, forced:]
    for pair in range(0, pairs, heads):
        count = min(heads, pairs - pair)
        for first in range(0, rows, part):
            size = min(part, rows - first)
            tile_scores_kernel[(triton.cdiv(N, block_n), triton.cdiv(size, block_t), count)](
                *(queries.mean_q, k, queries.log_mass, deviation, scratch),
                *(pair, first, size, H, N, layout.tokens, *k.stride()[:3], stride, part),
                *(*layout.square_grid(queries.pool), layout.square_grid(tile)[1], queries.scale),
                SIDE=tile // queries.pool,
                ROWS=min(tile // queries.pool, layout.square_grid(queries.pool)[0]),
                HEAD_DIM=d,
                BLOCK_T=block_t,
                BLOCK_N=block_n,
                BLOCK_D=max(16, triton.next_power_of_2(d)),
            )
            at = pair * rows + first
            listed = indices.view(-1, budget)[at : at + (count - 1) * rows + size]
            launch_select(scratch, listed, own, rows=rows, N=N, forced=forced, first_row=first)
            if scores is not None:
                scores.view(-1, N)[at : at + len(listed)] = scratch[: len(listed), :N]
    return indices


def scratch_rows(query_bytes: int, row_bytes: int) -> int:
    """Rows of scores that exist at once."""
    return int(max(_SCRATCH_SHARE * query_bytes, tuned.SCORE_BYTES)) // row_bytes


@triton.jit
def tile_scores_kernel(
    mean_q,  # [B * H, SQUARES_H * SQUARES_W, d]
    k,  # [B, H, N, d]
    log_mass,  # fp32 [B * H, SQUARES_H * SQUARES_W] or None
    log_deviation,  # fp32 [B * H, tokens], from the first of N keys on, or None
    scores,  # [pairs * part, stride]
    first_pair, first_row, size, H, N, tokens,
    k_batch, k_head, k_token,
    stride, part, SQUARES_H, SQUARES_W, TILES_W, scale,
    SIDE: tl.constexpr,
    ROWS: tl.constexpr,  # of squares of a whole tile: SIDE, or those of the grid if they are fewer
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tiles, each of ROWS x SIDE squares with a mean query, times BLOCK_N keys of one head."""
    pair = first_pair + tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)[None, :]
    is_row, is_dim, is_key = row < size, dim < HEAD_DIM, token < N
    top, left = (first_row + row) // TILES_W * SIDE, (first_row + row) % TILES_W * SIDE
    k += pair // H * k_batch + pair % H * k_head
    key_at = token[:, None].to(tl.int64) * k_token + dim
    key = tl.load(k + key_at, mask=is_key[:, None] & is_dim, other=0.0)  # [BLOCK_N, BLOCK_D]
    best = tl.full([BLOCK_T, BLOCK_N], -float("inf"), tl.float32)
    for member in range(ROWS * SIDE):
        # squares that the edge cuts off are the tile's first
        y = tl.where(top + member // SIDE < SQUARES_H, top + member // SIDE, top)
        x = tl.where(left + member % SIDE < SQUARES_W, left + member % SIDE, left)
        square = pair * SQUARES_H * SQUARES_W + y * SQUARES_W + x
        at = square[:, None] * HEAD_DIM + dim
        query = tl.load(mean_q + at, mask=is_row[:, None] & is_dim, other=0.0)  # [BLOCK_T, BLOCK_D]
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        if log_mass is not None:
            score -= tl.load(log_mass + square, mask=is_row, other=0.0)[:, None]
        best = score if ROWS * SIDE == 1 else tl.maximum(best, score, propagate_nan=tl.PropagateNan.ALL)
    if log_deviation is not None:
        best += tl.load(log_deviation + pair * tokens + token, mask=is_key, other=0.0)[None, :]
    to = (tl.program_id(2) * part + row)[:, None].to(tl.int64) * stride + token[None, :]
    # up to the stride, so that vectors are stored whole
    best = tl.where(is_key[None, :], best, -float("inf"))
    tl.store(scores + to, best.to(scores.dtype.element_ty), mask=is_row[:, None] & (token < stride)[None, :])


@triton.jit
def _add_mass(query, key, log_count, best, weight, scale):
    """Online log-sum-exp of the logits of more keys, [BLOCK_R, BLOCK_W]; a count of 0 leaves a key out."""
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale + log_count[None, :]
    new_best = tl.maximum(best, tl.max(logits, 1))
    shift = tl.where(new_best == -float("inf"), 0.0, new_best)
    weight = weight * tl.exp(best - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
    return new_best, weight


@triton.jit
def log_mass_kernel(
    mean_q,  # [B * H, squares, d]
    k,  # [B, H, N, d]
    mean_k,  # [B * H, windows, d]
    log_mass,  # fp32 [B * H, squares]
    k_batch, k_head, k_token,
    H, squares, GRID_H, GRID_W, PREFIX, windows, scale,
    SIDE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R mean queries over the prefix's keys and the windows' mean keys, weighted by their patches."""
    pair = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    dim = tl.arange(0, BLOCK_D)[None, :]
    is_row, is_dim = row < squares, dim < HEAD_DIM
    at = (pair * squares + row)[:, None] * HEAD_DIM + dim
    query = tl.load(mean_q + at, mask=is_row[:, None] & is_dim, other=0.0)
    k += pair // H * k_batch + pair % H * k_head
    best = tl.full([BLOCK_R], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, PREFIX, BLOCK_W):
        token = start + tl.arange(0, BLOCK_W)
        is_key = token < PREFIX
        key_at = token[:, None].to(tl.int64) * k_token + dim
        key = tl.load(k + key_at, mask=is_key[:, None] & is_dim, other=0.0)
        best, weight = _add_mass(query, key, tl.where(is_key, 0.0, -float("inf")), best, weight, scale)
    columns = tl.cdiv(GRID_W, SIDE)
    for start in range(0, windows, BLOCK_W):
        window = start + tl.arange(0, BLOCK_W)
        height = tl.minimum(GRID_H - window // columns * SIDE, SIDE)
        width = tl.minimum(GRID_W - window % columns * SIDE, SIDE)
        is_key = window < windows
        key_at = (pair * windows + window)[:, None] * HEAD_DIM + dim
        key = tl.load(mean_k + key_at, mask=is_key[:, None] & is_dim, other=0.0)
        count = tl.where(is_key, height * width, 1).to(tl.float32)
        log_count = tl.where(is_key, tl.log(count), -float("inf"))
        best, weight = _add_mass(query, key, log_count, best, weight, scale)
    tl.store(log_mass + pair * squares + row, best + tl.log(weight), mask=is_row)
