"""The low-rank predictor and the selection from its scores, which never reach memory, in Triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsifiner import tuned
from sparsifiner.geometry.grid import layout_of
from sparsifiner.ops.arguments import LowRankArguments
from sparsifiner.ops.program import Buffer, Draft, operation
from sparsifiner.ops.select.triton_backend import (
    LARGEST_BLOCK,
    OwnTokens,
    normal_quantile,
    padded_length,
    program_shape,
)
from sparsifiner.ops.select.triton_kernels import write_forced, write_lists
from sparsifiner.ops.triton_kernel import kernel
from sparsifiner.ops.triton_means import square_means

# Keys of a basis row that one program copies.
_COPIED = 1024


def lists_by_lowrank(*arguments: Any) -> Tensor:
    """As `select_lowrank` says, of `LowRankArguments` of any strides.

    Raises:
        ValueError: a weight's shape or device does not fit.
    """
    given = LowRankArguments(*arguments)
    given.check()
    q, k, *small, basis, geometry, temperature, coef_topk, budget, forced = given
    return select_lowrank(
        *(q, k, *(weight.contiguous() for weight in small), basis.mT),
        geometry=tuple(geometry),
        temperature=temperature,
        coef_topk=coef_topk,
        budget=budget,
        forced=forced,
    )[0]


@operation
def select_lowrank(
    draft: Draft,
    q: Buffer,
    k: Buffer,
    *weights: Buffer,
    geometry: tuple[int, ...],
    temperature: float,
    coef_topk: int,
    budget: int,
    forced: int,
    with_scores: bool = False,
) -> tuple[Buffer, ...]:
    """Lists of the scores C̃ Ũᵀ.

    Args:
        draft: what is written to.
        q: [B, H, N, d] queries, fp32, bf16 or fp16, with contiguous rows.
        k: [B, H, N, d] keys, likewise.
        *weights: as `LowRankArguments`, contiguous; the basis as [N, K], of any strides.
        geometry: of the layout, with the side of a tile in patches; N - forced at most `LARGEST_BLOCK`.
        temperature: factor of the coefficients' logits.
        coef_topk: coefficients of a row that are kept.
        budget: list length.
        forced: the first keys, in every list.
        with_scores: return the scores too, for tests.

    Returns:
        int32 [B, H, rows, budget], ascending, -1 last; the scores of keys that are not forced, fp32
        [B, H, rows, N - forced], if they are asked for.
    """
    B, H, N, _ = q.shape
    layout, tile = layout_of(geometry), geometry[3]
    (coefficients,) = lowrank_coefficients.write(
        draft, q, k, *weights[:-1], geometry=geometry, temperature=temperature
    )
    basis = _aligned_basis(draft, weights[-1].transpose(0, 1).since(forced, 1))
    rows, K = coefficients.shape[2:]
    own = OwnTokens(layout=layout, side=tile)
    N -= forced
    assert N <= LARGEST_BLOCK
    indices = draft.empty(B, H, rows, budget, dtype=torch.int32)
    scores = draft.empty(B, H, rows, N, dtype=torch.float32) if with_scores else None
    shape = program_shape(N, budget, own)
    draft.launch(
        select_lowrank_kernel,
        (triton.cdiv(B * H * rows, shape["ROWS"]),),
        *(coefficients, basis, indices, scores, *own.arguments()),
        *(B * H * rows, rows, N, K, basis.strides[0], budget, forced, normal_quantile(N, budget - forced)),
        KEPT=coef_topk,
        BLOCK_BASIS=triton.next_power_of_2(K),
        WRITE_SCORES=with_scores,
        **shape,
    )
    return (indices,) if scores is None else (indices, scores)


def _aligned_basis(draft: Draft, basis: Buffer) -> Buffer:
    """A basis [K, N] of any strides in rows of whole vectors, which are read again and again."""
    K, N = basis.shape
    aligned = draft.empty(K, padded_length(N), dtype=basis.dtype)
    draft.launch(
        align_basis_kernel,
        (triton.cdiv(N, _COPIED), K),
        *(basis, aligned),
        *(*basis.strides, N, aligned.shape[1]),
        BLOCK=_COPIED,
    )
    return aligned


@operation
def lowrank_coefficients(
    draft: Draft,
    q: Buffer,
    k: Buffer,
    query_weight: Buffer,
    query_bias: Buffer,
    key_weight: Buffer,
    key_bias: Buffer,
    down: Buffer,
    *,
    geometry: tuple[int, ...],
    temperature: float,
) -> tuple[Buffer]:
    """C, all K coefficients of every row: fp32 [B, H, rows, K], see `LowRankScorer.coefficients`."""
    B, H, N, d = q.shape
    layout, tile = layout_of(geometry), geometry[3]
    c, K = query_weight.shape[0], down.shape[1]
    rows, prefix = layout.squares(tile), layout.prefix
    # W_downᵀ k, by parts of a head; the projection of keys commutes with it
    parts = triton.cdiv(N, tuned.SUMMED_KEYS)
    blocks = {
        "HEAD_DIM": d,
        "BLOCK_D": max(16, triton.next_power_of_2(d)),
        "BLOCK_BASIS": max(16, triton.next_power_of_2(K)),
    }
    sums = draft.empty(B * H, parts, K, d, dtype=torch.float32)
    shares = draft.empty(parts, K, dtype=torch.float32)
    # 16-bit keys are whole in TF32: three products with parts of fp32 weights are as good as fp32 ones
    precision = "ieee" if k.dtype == torch.float32 else "tf32x3"
    draft.launch(
        sum_keys_kernel,
        (parts, B * H),
        *(k, down, sums, shares),
        *(*k.strides[:3], H, N, K),
        PART_KEYS=tuned.SUMMED_KEYS,
        BLOCK_N=32,
        PRECISION=precision,
        **blocks,
    )
    query = q.since(prefix, 2)
    if tile > 1:
        query = square_means(draft, q, layout, tile, dtype=torch.float32)[0]
    coefficients = draft.empty(B, H, rows, K, dtype=torch.float32)
    draft.launch(
        coefficients_kernel,
        (triton.cdiv(rows, tuned.COEFFICIENT_ROWS), B * H),
        *(query, sums, shares, query_weight, query_bias, key_weight, key_bias, coefficients),
        *(*query.strides[:3], H, rows, K, c, parts, temperature),
        BLOCK_R=tuned.COEFFICIENT_ROWS,
        BLOCK_C=max(16, triton.next_power_of_2(c)),
        num_warps=8,
        **blocks,
    )
    return (coefficients,)


@kernel
def align_basis_kernel(
    basis,  # [K, N]
    aligned,  # [K, length]
    basis_row, basis_key, N, length,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK keys of one row of the basis."""
    key, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1)
    value = tl.load(
        basis + row.to(tl.int64) * basis_row + key.to(tl.int64) * basis_key, mask=key < N, other=0.0
    )
    tl.store(aligned + row.to(tl.int64) * length + key, value, mask=key < length)


@kernel
def sum_keys_kernel(
    k,  # [B, H, N, d]
    down,  # [N, K]
    sums,  # fp32 [B * H, parts, K, d]
    shares,  # fp32 [parts, K]
    k_batch, k_head, k_token, H, N, K,
    PART_KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_BASIS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of a head: its share of W_downᵀ k, and of the column sums of W_down."""
    part, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    k += pair // H * k_batch + pair % H * k_head
    base, dim = tl.arange(0, BLOCK_BASIS), tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_BASIS, BLOCK_D], tl.float32)
    share = tl.zeros([BLOCK_BASIS], tl.float32)
    for start in range(part * PART_KEYS, tl.minimum((part + 1) * PART_KEYS, N), BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        mask = (token < N)[:, None] & (dim < HEAD_DIM)[None, :]
        at = token.to(tl.int64)[:, None] * k_token + dim[None, :]
        key = tl.load(k + at, mask=mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        at = token[None, :] * K + base[:, None]
        mask = (token < N)[None, :] & (base < K)[:, None]
        weight = tl.load(down + at, mask=mask, other=0.0)  # [BLOCK_BASIS, BLOCK_N]
        share += tl.sum(weight.to(tl.float32), 1)
        if weight.dtype != key.dtype:
            weight, key = weight.to(tl.float32), key.to(tl.float32)
        total = tl.dot(weight, key, acc=total, input_precision=PRECISION)
    at = ((pair * tl.num_programs(0) + part) * K + base[:, None]) * HEAD_DIM + dim[None, :]
    tl.store(sums + at, total, mask=(base < K)[:, None] & (dim < HEAD_DIM)[None, :])
    if pair == 0:
        tl.store(shares + part * K + base, share, mask=base < K)


@kernel
def coefficients_kernel(
    query,  # [B, H, rows, d]
    sums,  # fp32 [B * H, parts, K, d]
    shares,  # fp32 [parts, K]
    query_weight,  # [c, d]
    query_bias,  # [c]
    key_weight,  # [c, d]
    key_bias,  # [c]
    coefficients,  # fp32 [B * H, rows, K]
    q_batch, q_head, q_row, H, rows, K, c, parts, temperature,
    HEAD_DIM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_BASIS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_R rows of one head: softmax over the basis of q' k_downᵀ."""
    base, dim, reduced = tl.arange(0, BLOCK_BASIS), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_C)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    pair = tl.program_id(1).to(tl.int64)
    is_dim = (dim < HEAD_DIM)[None, :]
    total = tl.zeros([BLOCK_BASIS, BLOCK_D], tl.float32)
    share = tl.zeros([BLOCK_BASIS], tl.float32)
    for part in range(parts):
        share += tl.load(shares + part * K + base, mask=base < K, other=0.0)
        at = ((pair * parts + part) * K + base[:, None]) * HEAD_DIM + dim[None, :]
        total += tl.load(sums + at, mask=(base < K)[:, None] & is_dim, other=0.0)
    mask = (reduced < c)[:, None] & is_dim
    at = reduced[:, None] * HEAD_DIM + dim[None, :]
    weight = tl.load(key_weight + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_C, BLOCK_D]
    bias = tl.load(key_bias + reduced, mask=reduced < c, other=0.0).to(tl.float32)
    key_down = tl.dot(total, tl.trans(weight), input_precision="ieee") + share[:, None] * bias[None, :]

    query += pair // H * q_batch + pair % H * q_head
    at_query = row.to(tl.int64)[:, None] * q_row + dim[None, :]
    x = tl.load(query + at_query, mask=(row < rows)[:, None] & is_dim, other=0.0).to(tl.float32)
    weight = tl.load(query_weight + at, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(query_bias + reduced, mask=reduced < c, other=0.0).to(tl.float32)
    reduced_query = tl.dot(x, tl.trans(weight), input_precision="ieee") + bias[None, :]  # [BLOCK_R, BLOCK_C]

    logits = tl.dot(reduced_query, tl.trans(key_down), input_precision="ieee") * temperature
    logits = tl.where((base < K)[None, :], logits, -float("inf"))  # [BLOCK_R, BLOCK_BASIS]
    weight = tl.exp(logits - tl.max(logits, 1)[:, None])
    result = weight / tl.sum(weight, 1)[:, None]
    to = (pair * rows + row)[:, None] * K + base[None, :]
    tl.store(coefficients + to, result, mask=(row < rows)[:, None] & (base < K)[None, :])


@kernel
def select_lowrank_kernel(
    coefficients,  # fp32 [B * H * rows, K]
    basis,  # [K, stride], of all keys but the first `forced`
    indices,  # [B * H * rows, budget]
    scores,  # fp32 [B * H * rows, N], or None
    own,  # None
    m, GRID_H, GRID_W, PREFIX, total, rows, N, K, stride, budget, forced, quantile,
    KEPT: tl.constexpr,
    OWN_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_BASIS: tl.constexpr,
    WRITE_SCORES: tl.constexpr,
):  # fmt: skip
    """ROWS rows: their largest coefficients one by one, lowest index first, each times its basis row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < total
    key = tl.arange(0, BLOCK)[None, :]
    base = tl.arange(0, BLOCK_BASIS)[None, :]
    weight = tl.load(coefficients + row[:, None] * K + base, mask=is_row[:, None] & (base < K), other=-1.0)
    score = tl.zeros([ROWS, BLOCK], tl.float32)
    for _ in tl.static_range(KEPT):
        largest = tl.max(weight, 1)
        # rows that hold NaN have no largest one, and their scores become NaN
        at = tl.minimum(tl.min(tl.where(weight == largest[:, None], base, BLOCK_BASIS), 1), K - 1)
        part = tl.load(basis + at[:, None] * stride + key, mask=is_row[:, None] & (key < stride), other=0.0)
        score += tl.sum(tl.where(base == at[:, None], weight, 0.0), 1)[:, None] * part.to(tl.float32)
        weight = tl.where(base == at[:, None], -1.0, weight)
    if WRITE_SCORES:
        tl.store(scores + row[:, None] * N + key, score, mask=is_row[:, None] & (key < N))
    score = tl.where(key < N, score, -float("inf"))
    own_row = (row % rows).to(tl.int32)
    indices += row * budget
    write_forced(indices, is_row, forced)
    write_lists(
        score, indices + forced, own_row, is_row,
        own, m, GRID_H, GRID_W, PREFIX, N, budget - forced, forced, quantile, 0, OWN_SIDE, BLOCK_K,
    )  # fmt: skip
