"""Sparse attention in Triton: launches of the kernels, forward and backward."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from sparsifiner import tuned
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops.sparse_attention.triton_backward import (
    add_entries_kernel,
    attend_backward_kernel,
    key_gradients_kernel,
)
from sparsifiner.ops.sparse_attention.triton_forward import (
    attend_kernel,
    join_splits_kernel,
    missing_kernel,
)
from sparsifiner.ops.sparse_attention.triton_packing import PACKED_SIDE, PackedLists, pack_lists
from sparsifiner.ops.triton_means import square_means

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Problem:
    """The sizes of one call.

    Attributes:
        layout: where the tokens lie.
        tile: side of a tile of queries that share a list; 1 for a list per query.
        summary: side of the windows, 0 for no summaries.
        scale: factor of the logits.
        ascending: whether lists ascend as those of `select_topk` do, and are read as they are.
    """

    layout: TokenLayout
    tile: int
    summary: int
    scale: float
    ascending: bool

    @property
    def rows(self) -> int:
        """Lists per batch element and head."""
        return self.layout.squares(self.tile)

    @property
    def packed(self) -> bool:
        """Whether lists of single queries are packed by tile."""
        return self.tile == 1 and self.ascending

    @property
    def side(self) -> int:
        """Side of the tile of queries that a program attends for."""
        return PACKED_SIDE if self.packed else self.tile

    @property
    def tiles(self) -> int:
        """Tiles per batch element and head."""
        return self.layout.squares(self.side)

    @property
    def windows(self) -> int:
        """Summary keys."""
        return self.layout.squares(self.summary) if self.summary else 0

    @property
    def queries(self) -> int:
        """Places of queries in a tile: rows of its side, of which there are no more than the grid has."""
        return self.layout.square_shape(self.side)[0] * self.side

    @property
    def count_dtype(self) -> torch.dtype:
        """Of the tokens of a window that a list lacks."""
        height, width = self.layout.square_shape(self.summary)
        return torch.uint8 if height * width <= torch.iinfo(torch.uint8).max else torch.int32

    def block_m(self, q: Tensor) -> int:
        """Queries of one program; larger tiles are divided."""
        largest = tuned.ATTEND_QUERIES
        if q.dtype == torch.float32:  # whose products take registers instead of matrix units
            largest = tuned.ATTEND_QUERIES_FP32[q.shape[-1] > 64]
        return max(16, min(largest, triton.next_power_of_2(self.queries)))

    def parts(self, q: Tensor) -> int:
        """Programs of one tile."""
        return triton.cdiv(self.queries, self.block_m(q))

    def prefix_parts(self, q: Tensor) -> int:
        """Parts of the prefix, each with a program per split."""
        return triton.cdiv(self.layout.prefix, self.block_m(q))

    @property
    def splits(self) -> int:
        """Parts of all tokens, to which the prefix attends."""
        return triton.cdiv(self.layout.tokens, tuned.PREFIX_KEYS)

    def grid(self, q: Tensor) -> tuple[int, int]:
        """Programs: those of the prefix and of all tiles, for each batch element and head."""
        return self.prefix_parts(q) * self.splits + self.tiles * self.parts(q), q.shape[0] * q.shape[1]


def attend(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, means: Tensor | None, problem: Problem
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward pass.

    Args:
        q: [B, H, N, d], as are `k` and `v`; strided views will do.
        k: keys.
        v: values.
        indices: int32 [B, H, rows, keys].
        means: mean keys and values of the windows [2, B, H, W, d], None if they are still to be computed.
        problem: the sizes.

    Returns:
        `out` [B, H, N, d] and what the backward needs: log2 of the softmax's denominators, fp32
        [B, H, N], the means, or nothing where they were given, and the tokens of each window that each list
        lacks [B, H, rows, W].
    """
    B, H, N, d = q.shape
    q, k, v, indices = _rows(q), _rows(k), _rows(v), indices.contiguous()
    given = means is not None
    if means is None:
        means = (
            square_means(k, problem.layout, problem.summary, v)
            if problem.summary
            else k.new_empty(2, B, H, 0, d)
        )
    missing = _missing(indices, problem)
    lists = _lists(indices, problem)
    out = torch.empty(B, N, H, d, dtype=q.dtype, device=q.device).transpose(1, 2)
    log_weight = torch.empty(B, H, N, dtype=torch.float32, device=q.device)
    prefix, splits = problem.layout.prefix, problem.splits
    split_out = log_weight.new_empty(B, H, splits, prefix, d)
    split_log_weight = log_weight.new_empty(B, H, splits, prefix)
    attend_kernel[problem.grid(q)](
        *(q, k, v, *lists, _every_token(q, problem), means[0], means[1], missing, out, log_weight),
        *(split_out, split_log_weight),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        *(H, N, *problem.layout.grid, prefix, problem.tiles, lists.indices.shape[-1]),
        *(problem.windows, splits, problem.scale * _LOG2_E),
        SUMMARY_STAGES=2,
        **_blocks(q, problem),
        **_forward_options(q, problem),
    )
    if prefix:
        join_splits_kernel[(prefix, B * H)](
            *(split_out, split_log_weight, out, log_weight, *out.stride()[:3], H, N, prefix, splits),
            HEAD_DIM=d,
            BLOCK_S=triton.next_power_of_2(splits),
            BLOCK_D=_block_d(q),
        )
    return out, log_weight, k.new_empty(0) if given else means, missing


def attend_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    problem: Problem,
    *,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Args:
        d_out: gradient of `out` [B, H, N, d].
        q: as in the forward pass, like `k`, `v` and `indices`.
        k: keys.
        v: values.
        indices: int32 [B, H, rows, keys].
        saved: what `attend` returned, with the means.
        problem: the sizes.
        deterministic: keep what each list sends to each key and add it up in the order of the rows, in
            memory [B, H, rows, keys, d], instead of by atomics.

    Returns:
        Gradients [B, H, N, d].
    """
    B, H, N, d = q.shape
    q, k, v, indices, d_out = _rows(q), _rows(k), _rows(v), indices.contiguous(), _rows(d_out)
    out, log_weight, means, missing = saved
    lists = _lists(indices, problem)
    keys, pairs = lists.indices.shape[-1], B * H
    d_q, d_k, d_v = (
        torch.empty(B, N, H, d, dtype=q.dtype, device=q.device).transpose(1, 2) for _ in range(3)
    )
    parts = problem.parts(q)
    entries = problem.tiles * parts * keys + problem.prefix_parts(q) * N
    sums = torch.zeros(2, pairs, N, d, dtype=torch.float32, device=q.device)
    mean_sums = torch.zeros(2, pairs, problem.windows, d, dtype=torch.float32, device=q.device)
    sent, mean_sent = sums, mean_sums
    if deterministic:
        sent = sums.new_empty(2, pairs, entries, d)
        mean_sent = sums.new_empty(2, pairs, problem.tiles * parts, problem.windows, d)
    prefix, splits = problem.layout.prefix, problem.splits
    split_d_q = sums.new_empty(B, H, splits, prefix, d)
    attend_backward_kernel[problem.grid(q)](
        *(q, k, v, *lists, _every_token(q, problem), means[0], means[1], missing, out, log_weight),
        *(d_out, d_q, split_d_q),
        *(sent[0], sent[1], mean_sent[0], mean_sent[1]),
        *(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3]),
        *(*d_out.stride()[:3], *d_q.stride()[:3]),
        *(H, N, *problem.layout.grid, prefix, problem.tiles, keys),
        *(problem.windows, splits, entries, problem.scale * _LOG2_E, problem.scale),
        BLOCK_END=min(32, _block_n(q)),
        **_blocks(q, problem),
        DETERMINISTIC=deterministic,
    )
    if prefix:
        d_q[:, :, :prefix] = split_d_q.sum(2)
    block_d = _block_d(q)
    if deterministic:
        order, first = _entries_by_token(q, lists.indices, problem)
        add_entries_kernel[(N, pairs)](
            *(sent[0], sent[1], order, first, sums[0], sums[1], N, entries),
            HEAD_DIM=d,
            BLOCK_E=16,
            BLOCK_D=block_d,
        )
        mean_sums = mean_sent.sum(2)
    block_t = max(16, 4096 // block_d)
    key_gradients_kernel[(triton.cdiv(N, block_t), pairs)](
        *(sums[0], sums[1], mean_sums[0], mean_sums[1], d_k, d_v, *d_k.stride()[:3]),
        *(H, N, *problem.layout.grid, prefix, problem.windows),
        HEAD_DIM=d,
        SIDE=problem.summary,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
    )
    return d_q, d_k, d_v


def _missing(indices: Tensor, problem: Problem) -> Tensor:
    """Tokens of each window that each list lacks."""
    B, H = indices.shape[:2]
    side, windows, layout = problem.summary, problem.windows, problem.layout
    missing = torch.empty(B, H, problem.rows, windows, dtype=problem.count_dtype, device=indices.device)
    if side:
        missing_kernel[(B * H * problem.rows,)](
            *(indices, missing, indices.shape[-1], *layout.grid, layout.prefix, windows),
            SIDE=side,
            BLOCK_N=min(1024, triton.next_power_of_2(indices.shape[-1])),
            BLOCK_W=triton.next_power_of_2(windows),
            ASCENDING=problem.ascending,
            num_warps=2,
        )
    return missing


def _entries_by_token(q: Tensor, indices: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Which entries of the lists name each token: their order by token, and where each token begins."""
    B, H, tiles, keys = indices.shape
    N = problem.layout.tokens
    every = torch.arange(N, device=indices.device)
    is_key = (indices >= 0) & (indices < N)
    listed = torch.where(is_key, indices, N).long().unsqueeze(3)
    listed = listed.expand(B, H, tiles, problem.parts(q), keys).flatten(2).flatten(0, 1)
    prefix = every.repeat(problem.prefix_parts(q)).expand(B * H, -1)
    token, order = torch.cat([listed, prefix], 1).sort(dim=1, stable=True)
    bounds = torch.arange(N + 1, device=indices.device).expand(B * H, -1).contiguous()
    return order, torch.searchsorted(token.contiguous(), bounds)


def _lists(indices: Tensor, problem: Problem) -> PackedLists:
    """One list per tile, with bits where single queries are packed."""
    return pack_lists(indices, problem.layout) if problem.packed else PackedLists(indices)


def _every_token(q: Tensor, problem: Problem) -> Tensor:
    """The list of the prefix; without one, nobody reads it."""
    count = problem.layout.tokens if problem.layout.prefix else 0
    return torch.arange(count, dtype=torch.int32, device=q.device)


def _rows(x: Tensor) -> Tensor:
    """The tensor itself where its rows are contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _block_d(q: Tensor) -> int:
    return max(16, triton.next_power_of_2(q.shape[-1]))


def _block_n(q: Tensor) -> int:
    return tuned.ATTEND_KEYS_FP32 if q.dtype == torch.float32 else tuned.ATTEND_KEYS


def _forward_options(q: Tensor, problem: Problem) -> dict[str, int]:
    """Registers that let a fourth program of 64 queries and head dim 64 onto a multiprocessor."""
    is_small = problem.block_m(q) * _block_d(q) <= 64 * 64 and q.dtype != torch.float32
    return {"maxnreg": tuned.ATTEND_REGISTERS} if is_small and not problem.packed else {}


def _blocks(q: Tensor, problem: Problem) -> dict[str, int]:
    """Sizes that the kernels are compiled for."""
    return {
        "HEAD_DIM": q.shape[-1],
        "TILE": problem.side,
        "PARTS": problem.parts(q),
        "BLOCK_M": problem.block_m(q),
        "SPLIT_KEYS": tuned.PREFIX_KEYS,
        "BLOCK_N": _block_n(q),
        "BLOCK_W": max(16, min(_block_n(q), triton.next_power_of_2(max(1, problem.windows)))),
        "BLOCK_D": _block_d(q),
        "PACKED": problem.packed,
        "ASCENDING": problem.ascending,
        # four warps hold no more than 64 x 64 of the sums without spilling
        "num_warps": 8 if problem.block_m(q) * _block_d(q) > 64 * 64 else 4,
    }
