"""Tile-mean query · key, and the selection from it, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsifiner.layout import TokenLayout
from sparsifiner.ops.select.triton_backend import OwnTokens, launch_select, padded_length
from sparsifiner.ops.triton_means import square_means

# Bytes of scores that exist at once: these, or about those of q, which the output needs later anyway.
_SCRATCH_BYTES = 6 * 2**20
_SCRATCH_SHARE = 9 / 8


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
    B, H, _, d = q.shape
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    k = k[:, :, forced:]
    N = k.shape[2]
    rows, pairs = layout.squares(tile), B * H
    indices = torch.empty(B, H, rows, budget, dtype=torch.int32, device=q.device)
    if not pairs:
        return indices
    mean_q = square_means(q, layout, tile)[0]
    stride = padded_length(N)
    dtype = torch.float32 if q.dtype == torch.float32 else torch.bfloat16
    chunk = max(1, scratch_rows(q.numel() * q.element_size(), stride * dtype.itemsize))
    # whole heads where they fit, else parts of one; alike in size, since small launches leave the GPU idle
    heads = triton.cdiv(pairs, triton.cdiv(pairs, max(1, chunk // rows)))
    part = triton.cdiv(rows, triton.cdiv(rows, chunk))
    own = OwnTokens(layout=layout, side=tile)
    scratch = torch.empty(heads * part, stride, dtype=dtype, device=q.device)
    # products of fp32 take registers instead of matrix units
    largest = (32, 64) if dtype == torch.float32 else (64, 128)
    block_t, block_n = max(16, min(largest[0], triton.next_power_of_2(part))), largest[1]
    for pair in range(0, pairs, heads):
        count = min(heads, pairs - pair)
        for first in range(0, rows, part):
            size = min(part, rows - first)
            pooled_scores_kernel[(triton.cdiv(N, block_n), triton.cdiv(size, block_t), count)](
                *(mean_q, k, scratch, pair, first, size, H, N, rows, *k.stride()[:3], stride, part),
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
    return int(max(_SCRATCH_SHARE * query_bytes, _SCRATCH_BYTES)) // row_bytes


@triton.jit
def pooled_scores_kernel(
    mean_q,  # [B * H, rows, d]
    k,  # [B, H, N, d]
    scores,  # [pairs * part, stride]
    first_pair, first_row, size, H, N, rows,
    k_batch, k_head, k_token,
    stride, part,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_T mean queries times BLOCK_N keys of one head."""
    pair = first_pair + tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)[None, :]
    is_dim = dim < HEAD_DIM
    at = (pair * rows + first_row + row) * HEAD_DIM + dim
    query = tl.load(mean_q + at, mask=(row < size) & is_dim, other=0.0)  # [BLOCK_T, BLOCK_D]
    k += pair // H * k_batch + pair % H * k_head
    at = token[:, None].to(tl.int64) * k_token + dim
    key = tl.load(k + at, mask=(token < N)[:, None] & is_dim, other=0.0)  # [BLOCK_N, BLOCK_D]
    score = tl.dot(query, tl.trans(key), input_precision="ieee")
    to = (tl.program_id(2) * part + row).to(tl.int64) * stride + token[None, :]
    # up to the stride, so that vectors are stored whole
    score = tl.where((token < N)[None, :], score, -float("inf"))
    tl.store(scores + to, score.to(scores.dtype.element_ty), mask=(row < size) & (token < stride)[None, :])
