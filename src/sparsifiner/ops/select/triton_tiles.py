"""Scores of tiles, pooled or by impact, and the selection from them, in Triton."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsifiner import tuned
from sparsifiner.geometry.grid import TokenLayout, layout_of
from sparsifiner.ops.program import Buffer, Draft, operation
from sparsifiner.ops.select.triton_backend import OwnTokens, launch_select, padded_length
from sparsifiner.ops.triton_counts import Begun
from sparsifiner.ops.triton_kernel import kernel, quotient
from sparsifiner.ops.triton_means import square_means, window_statistics

# As many scores exist at once as `tuned.SCORE_BYTES` hold, or about those of q, which the output needs later.
_SCRATCH_SHARE = 9 / 8
# Windows, or prefix keys, that one step of a program takes.
_BLOCK_W = 32


class TileQueries(NamedTuple):
    """What scores the keys for a tile: the mean queries of the squares that it is cut into.

    Attributes:
        mean_q: [1, B, H, squares, d].
        layout: where the tokens lie.
        tile: side of a tile in patches.
        pool: side of the squares.
        scale: factor of the products.
        log_mass: fp32 [B, H, squares], subtracted from a square's products; None for nothing.
        log_deviation: fp32 [B, H, N], added to every score of a key; None for nothing.
    """

    mean_q: Buffer
    layout: TokenLayout
    tile: int
    pool: int
    scale: float = 1.0
    log_mass: Buffer | None = None
    log_deviation: Buffer | None = None


def lists_by_pooled(q: Tensor, k: Tensor, geometry: Sequence[int], budget: int, forced: int) -> Tensor:
    """As `select_pooled` says, of tensors of any strides."""
    return select_pooled(q, k, geometry=tuple(geometry), budget=budget, forced=forced)[0]


def lists_by_impact(
    q: Tensor, k: Tensor, v: Tensor, geometry: Sequence[int], scale: float, budget: int, forced: int
) -> tuple[Tensor, Tensor]:
    """As `select_impact` says, of tensors of any strides."""
    sizes = {"geometry": tuple(geometry), "scale": scale, "budget": budget, "forced": forced}
    indices, means = select_impact(q, k, v, **sizes)
    return indices, means


@operation
def select_pooled(
    draft: Draft,
    q: Buffer,
    k: Buffer,
    *,
    geometry: tuple[int, ...],
    budget: int,
    forced: int,
    with_scores: bool = False,
    begun: Begun | None = None,
) -> tuple[Buffer, ...]:
    """Lists of the keys with the largest products with the mean query of a tile.

    Scores are fp32 for fp32 inputs and rounded to bf16 for 16-bit ones, whose products they are.

    Args:
        draft: what is written to.
        q: [B, H, N, d] queries, fp32, bf16 or fp16, with contiguous rows.
        k: [B, H, N, d] keys, likewise.
        geometry: of the layout, with the side of a tile in patches.
        budget: list length.
        forced: the first keys, in every list.
        with_scores: return the scores too, for tests.
        begun: what attention begins with, to be written beside the lists, see `launch_select`.

    Returns:
        int32 [B, H, rows, budget], ascending, -1 last; the scores of keys that are not forced
        [B * H * rows, at least N - forced] if they are asked for.
    """
    layout, tile = layout_of(geometry), geometry[3]
    queries = TileQueries(square_means(draft, q, layout, tile), layout, tile, tile)
    return _select(draft, queries, k, budget, forced, torch.bfloat16, with_scores, begun)


@operation
def select_impact(
    draft: Draft,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    *,
    geometry: tuple[int, ...],
    scale: float,
    budget: int,
    forced: int,
    with_scores: bool = False,
    begun: Begun | None = None,
) -> tuple[Buffer, ...]:
    """Lists by the scores of `sparsifiner.scorers.ImpactScorer`.

    Scores are fp32 for fp32 inputs and rounded to fp16 for 16-bit ones: logarithms need precision, not range.

    Args:
        draft: what is written to.
        q: [B, H, N, d] queries, fp32, bf16 or fp16, with contiguous rows.
        k: [B, H, N, d] keys, likewise.
        v: [B, H, N, d] values, likewise.
        geometry: of the layout, with the sides in patches of a tile, of the squares whose mean queries score,
            and of a window.
        scale: factor of the logits.
        budget: list length.
        forced: the first keys, in every list.
        with_scores: return the scores too, for tests.
        begun: what attention begins with, to be written beside the lists, see `launch_select`.

    Returns:
        int32 [B, H, rows, budget], ascending, -1 last; the means of keys and values over the windows
        [2, B, H, windows, d]; the scores if they are asked for, as `select_pooled` gives them.
    """
    layout, (tile, pool, summary) = layout_of(geometry), geometry[3:]
    mean_q = square_means(draft, q, layout, pool)
    means, log_deviation = window_statistics(draft, k, v, layout, summary)
    log_mass = None if pool == tile else _log_mass(draft, mean_q, k, means, layout, summary, scale)
    queries = TileQueries(mean_q, layout, tile, pool, scale, log_mass, log_deviation)
    indices, *scores = _select(draft, queries, k, budget, forced, torch.float16, with_scores, begun)
    return indices, means, *scores


def _log_mass(
    draft: Draft, mean_q: Buffer, k: Buffer, means: Buffer, layout: TokenLayout, summary: int, scale: float
) -> Buffer:
    """Log of a mean query's softmax denominator over prefix keys and windows: fp32 [B, H, squares]."""
    _, B, H, squares, d = mean_q.shape
    log_mass = draft.empty(B, H, squares, dtype=torch.float32)
    block_r = max(16, min(64, triton.next_power_of_2(squares)))
    draft.launch(
        log_mass_kernel,
        (triton.cdiv(squares, block_r), B * H),
        *(mean_q, k, means[0], log_mass, *k.strides[:3]),
        *(H, squares, *layout.grid, layout.prefix, means.shape[3], summary, scale),
        HEAD_DIM=d,
        BLOCK_R=block_r,
        BLOCK_W=_BLOCK_W,
        BLOCK_D=max(16, triton.next_power_of_2(d)),
    )
    return log_mass


def _select(
    draft: Draft,
    queries: TileQueries,
    k: Buffer,
    budget: int,
    forced: int,
    short_dtype: torch.dtype,
    with_scores: bool,
    begun: Begun | None,
) -> tuple[Buffer, ...]:
    """Lists of the best keys, chunk by chunk of rows, so that scores do not exist whole unless they must."""
    k = k.since(forced, 2)
    B, H, N, d = k.shape
    layout, tile = queries.layout, queries.tile
    rows, pairs = layout.squares(tile), B * H
    indices = draft.empty(B, H, rows, budget, dtype=torch.int32)
    stride = padded_length(N)
    dtype = torch.float32 if k.dtype == torch.float32 else short_dtype
    query_bytes = pairs * layout.tokens * d * k.dtype.itemsize
    chunk = max(1, scratch_rows(query_bytes, stride * dtype.itemsize))
    # whole heads where they fit, else parts of one; alike in size, since small launches leave the GPU idle
    heads = triton.cdiv(pairs, max(1, triton.cdiv(pairs, max(1, chunk // rows))))
    part = triton.cdiv(rows, triton.cdiv(rows, chunk))
    own = OwnTokens(layout=layout, side=tile)
    scratch = draft.empty(pairs * rows if with_scores else heads * part, stride, dtype=dtype)
    side = tile // queries.pool
    members = min(side, layout.square_grid(queries.pool)[0]) * side
    largest = tuned.TILE_SCORES_FP32
    if dtype != torch.float32:
        largest = tuned.TILE_SCORES[max(fewest for fewest in tuned.TILE_SCORES if fewest <= members)]
    block_s = min(largest[0], triton.next_power_of_2(members))
    # a product takes at least 16 squares
    block_t = max(16 // block_s, min(largest[0] // block_s, triton.next_power_of_2(part)), 1)
    block_n = largest[1]
    deviation = None if queries.log_deviation is None else queries.log_deviation.since(forced, 2)
    for pair in range(0, pairs, max(1, heads)):
        count = min(heads, pairs - pair)
        for first in range(0, rows, part):
            size, row = min(part, rows - first), pair * rows + first
            scored = scratch.since(row, 0) if with_scores else scratch
            draft.launch(
                tile_scores_kernel,
                (triton.cdiv(N, block_n), triton.cdiv(size, block_t), count),
                *(queries.mean_q, k, queries.log_mass, deviation, scored),
                *(pair, first, size, H, N, layout.tokens, *k.strides[:3], stride, part),
                *(*layout.square_grid(queries.pool), layout.square_grid(tile)[1], queries.scale),
                SIDE=side,
                ROWS=members // side,
                HEAD_DIM=d,
                BLOCK_T=block_t,
                BLOCK_S=block_s,
                BLOCK_N=block_n,
                BLOCK_D=max(16, triton.next_power_of_2(d)),
            )
            launch_select(
                *(draft, replace(scored, shape=((count - 1) * part + size, N)), indices, own),
                rows=rows,
                forced=forced,
                first_row=first,
                row_of_indices=row,
                limit=stride,
                begun=begun,
            )
    return (indices, scratch) if with_scores else (indices,)


def scratch_rows(query_bytes: int, row_bytes: int) -> int:
    """Rows of scores that exist at once."""
    return int(max(_SCRATCH_SHARE * query_bytes, tuned.SCORE_BYTES)) // row_bytes


@kernel
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
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tiles times BLOCK_N keys of one head: products of BLOCK_S squares of each tile at once."""
    pair = first_pair + tl.program_id(2).to(tl.int64)
    place = tl.arange(0, BLOCK_T * BLOCK_S)
    row = tl.program_id(1) * BLOCK_T + place // BLOCK_S
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)[None, :]
    is_dim, is_key = dim < HEAD_DIM, token < N
    tile_y = quotient(first_row + row, TILES_W)
    top, left = tile_y * SIDE, (first_row + row - tile_y * TILES_W) * SIDE
    k += pair // H * k_batch + pair % H * k_head
    key_at = token[:, None].to(tl.int64) * k_token + dim
    key = tl.load(k + key_at, mask=is_key[:, None] & is_dim, other=0.0)  # [BLOCK_N, BLOCK_D]
    best = tl.full([BLOCK_N, BLOCK_T], -float("inf"), tl.float32)
    for start in range(0, ROWS * SIDE, BLOCK_S):
        member = start + place % BLOCK_S
        y, x = top + member // SIDE, left + member % SIDE
        # squares that are not there are the tile's first
        exists = (member < ROWS * SIDE) & (y < SQUARES_H) & (x < SQUARES_W)
        square = pair * SQUARES_H * SQUARES_W + tl.where(exists, y * SQUARES_W + x, top * SQUARES_W + left)
        at = square[:, None] * HEAD_DIM + dim
        query = tl.load(mean_q + at, mask=(row < size)[:, None] & is_dim, other=0.0)
        # keys first: squares of a tile then lie in one thread or its neighbours
        score = tl.dot(key, tl.trans(query), input_precision="ieee") * scale  # [BLOCK_N, BLOCK_T * BLOCK_S]
        if log_mass is not None:
            score -= tl.load(log_mass + square, mask=row < size, other=0.0)[None, :]
        if BLOCK_S > 1:
            score = tl.reduce(tl.reshape(score, [BLOCK_N, BLOCK_T, BLOCK_S]), 2, _larger)
        best = score if ROWS * SIDE <= BLOCK_S else _larger(best, score)
    if log_deviation is not None:
        best += tl.load(log_deviation + pair * tokens + token, mask=is_key, other=0.0)[:, None]
    # up to the stride, so that vectors are stored whole
    best = tl.where(is_key[:, None], best, -float("inf"))
    tile = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    to = (tl.program_id(2) * part + tile)[None, :].to(tl.int64) * stride + token[:, None]
    mask = (tile < size)[None, :] & (token < stride)[:, None]
    tl.store(scores + to, best.to(scores.dtype.element_ty), mask=mask)


@triton.jit
def _larger(a, b):
    """The larger, NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _add_mass(query, key, log_count, best, weight, scale):
    """Online log-sum-exp of the logits of more keys, [BLOCK_R, BLOCK_W]; a count of 0 leaves a key out."""
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale + log_count[None, :]
    new_best = tl.maximum(best, tl.max(logits, 1))
    shift = tl.where(new_best == -float("inf"), 0.0, new_best)
    weight = weight * tl.exp(best - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
    return new_best, weight


@kernel
def log_mass_kernel(
    mean_q,  # [B * H, squares, d]
    k,  # [B, H, N, d]
    mean_k,  # [B * H, windows, d]
    log_mass,  # fp32 [B * H, squares]
    k_batch, k_head, k_token,
    H, squares, GRID_H, GRID_W, PREFIX, windows, SIDE, scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R mean queries over the prefix's keys and the windows' mean keys, weighted by their patches."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    pair = tl.program_id(1).to(tl.int64)
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
