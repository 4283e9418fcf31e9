"""Gradients of sparse attention in Triton: launches of the backward pass."""

from collections.abc import Sequence
from math import prod

import torch
import triton
from torch import Tensor

from sparsifiner.ops.program import Buffer, Draft, operation
from sparsifiner.ops.sparse_attention.triton_backward import (
    add_entries_kernel,
    add_parts_kernel,
    attend_backward_kernel,
    count_kernel,
    key_gradients_kernel,
)
from sparsifiner.ops.sparse_attention.triton_packing import PackedLists
from sparsifiner.ops.sparse_attention.triton_problem import (
    LOG2_E,
    Problem,
    block_d,
    block_n,
    blocks,
    lists_by_tile,
)
from sparsifiner.ops.triton_kernel import fill

# Tokens that one program writes.
_COUNTED = 4096


def attend_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    out: Tensor,
    log_weight: Tensor,
    missing: Tensor,
    means: Tensor,
    geometry: Sequence[int],
    scale: float,
    ascending: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v.

    Where torch is asked for deterministic algorithms, what each list sends to each key is kept, in memory
    [B, H, rows, keys, d], and added up in the order of the rows instead of by atomics.

    Args:
        d_out: gradient of `out` [B, H, N, d].
        q: as in the forward pass, like `k`, `v` and `indices`.
        k: keys.
        v: values.
        indices: int32 [B, H, rows, keys].
        out: what `attend` returned, like `log_weight`, `missing` and, if they were not given, `means`.
        log_weight: the denominators.
        missing: counts.
        means: of the windows.
        geometry: see `attend`.
        scale: factor of the logits.
        ascending: see `Problem`.

    Returns:
        Gradients [B, H, N, d].
    """
    geometry = tuple(geometry)
    options = {"geometry": geometry, "scale": scale, "ascending": ascending}
    inputs = (d_out, q, k, v, indices.contiguous(), out, log_weight, missing, means)
    if not torch.are_deterministic_algorithms_enabled():
        d_q, d_k, d_v = _gradients(*inputs, **options)
        return d_q, d_k, d_v
    d_q, sent, mean_sent, *packed = _entries(*inputs, **options)
    problem = Problem(geometry, scale, ascending)
    # the sort is torch's, between two programs
    order, first = _entries_by_token(q, packed[0] if packed else indices, packed[1:], problem)
    d_k, d_v = _add_entries(k, sent, mean_sent, order, first, **options)
    return d_q, d_k, d_v


@operation
def _gradients(
    draft: Draft,
    *inputs: Buffer,
    geometry: tuple[int, ...],
    scale: float,
    ascending: bool,
) -> tuple[Buffer, Buffer, Buffer]:
    """Gradients that atomics add up; inputs as of `attend_backward`."""
    problem = Problem(geometry, scale, ascending)
    q = inputs[1]
    B, H, N, d = q.shape
    sums = draft.empty(2, B * H, N, d, dtype=torch.float32)
    mean_sums = draft.empty(2, B * H, problem.windows, d, dtype=torch.float32)
    fill(draft, sums, 0)
    fill(draft, mean_sums, 0)
    d_q, _ = _send(draft, inputs, sums, mean_sums, problem, deterministic=False)
    draft.adds_in_any_order()
    return d_q, *_key_gradients(draft, q, sums, mean_sums, problem)


@operation
def _entries(
    draft: Draft,
    *inputs: Buffer,
    geometry: tuple[int, ...],
    scale: float,
    ascending: bool,
) -> tuple[Buffer, ...]:
    """Gradients of queries, and what each list sends to each key and window; packed lists, if they are."""
    problem = Problem(geometry, scale, ascending)
    q, indices = inputs[1], inputs[4]
    B, H, _, d = q.shape
    programs = problem.tiles * problem.parts(q)
    sent = draft.empty(2, B * H, problem.entries(q, indices), d, dtype=torch.float32)
    mean_sent = draft.empty(2, B * H, programs, problem.windows, d, dtype=torch.float32)
    d_q, lists = _send(draft, inputs, sent, mean_sent, problem, deterministic=True)
    packed = (lists.indices, lists.lengths) if lists.lengths is not None else ()
    draft.writes_parts_of(sent, *packed[:1])
    return d_q, sent, mean_sent, *packed


@operation
def _add_entries(
    draft: Draft,
    k: Buffer,
    sent: Buffer,
    mean_sent: Buffer,
    order: Buffer,
    first: Buffer,
    *,
    geometry: tuple[int, ...],
    scale: float,
    ascending: bool,
) -> tuple[Buffer, Buffer]:
    """Gradients of keys and values from what was sent to them, in the order of the rows."""
    problem = Problem(geometry, scale, ascending)
    B, H, N, d = k.shape
    sums = draft.empty(2, B * H, N, d, dtype=torch.float32)
    mean_sums = draft.empty(2, B * H, problem.windows, d, dtype=torch.float32)
    draft.launch(
        add_entries_kernel,
        (N, B * H),
        *(sent[0], sent[1], order, first, sums[0], sums[1], N, sent.shape[2]),
        BLOCK_E=16,
        HEAD_DIM=d,
        BLOCK_D=block_d(k),
    )
    # keys and values behind each other, as more pairs
    _add_parts(draft, mean_sent, mean_sums, (0, *mean_sums.strides[1:3]), 2 * B * H)
    return _key_gradients(draft, k, sums, mean_sums, problem)


def _send(
    draft: Draft,
    inputs: tuple[Buffer, ...],
    sent: Buffer,
    mean_sent: Buffer,
    problem: Problem,
    *,
    deterministic: bool,
) -> tuple[Buffer, PackedLists]:
    """Gradients of queries [B, H, N, d]; writes what is sent to keys and windows, or adds it to them."""
    d_out, q, k, v, indices, out, log_weight, missing, means = inputs
    B, H, N, d = q.shape
    lists = lists_by_tile(draft, indices, problem)
    every = draft.empty(N, dtype=torch.int32)
    draft.launch(count_kernel, (triton.cdiv(N, _COUNTED),), every, N, BLOCK=_COUNTED)
    d_q = draft.empty(B, N, H, d, dtype=q.dtype).transpose(1, 2)
    prefix, splits = problem.layout.prefix, problem.splits
    split_d_q = draft.empty(B, H, splits, prefix, d, dtype=torch.float32)
    draft.launch(
        attend_backward_kernel,
        problem.grid(q),
        *(q, k, v, *lists, every, means[0], means[1], missing, out, log_weight, d_out, d_q, split_d_q),
        *(sent[0], sent[1], mean_sent[0], mean_sent[1]),
        *(*q.strides[:3], *k.strides[:3], *v.strides[:3], *out.strides[:3]),
        *(*d_out.strides[:3], *d_q.strides[:3]),
        *(H, N, *problem.layout.grid, prefix, problem.tiles, lists.indices.shape[-1]),
        *(problem.windows, splits, sent.shape[2], problem.scale * LOG2_E, problem.scale),
        BLOCK_END=min(32, block_n(q)),
        **blocks(q, problem),
        DETERMINISTIC=deterministic,
    )
    _add_parts(draft, split_d_q, d_q, d_q.strides[:3], H)
    return d_q, lists


def _add_parts(draft: Draft, x: Buffer, y: Buffer, strides: tuple[int, ...], H: int) -> None:
    """Adds up the parts of x [..., parts, rows, d] into y [..., rows, d], whose pairs lie as strides say."""
    parts, rows, d = x.shape[-3:]
    draft.launch(
        add_parts_kernel,
        (rows, prod(x.shape[:-3])),
        *(x, y, *strides, H, parts, rows),
        HEAD_DIM=d,
        BLOCK_D=max(16, triton.next_power_of_2(d)),
    )


def _key_gradients(
    draft: Draft, like: Buffer, sums: Buffer, mean_sums: Buffer, problem: Problem
) -> tuple[Buffer, Buffer]:
    """Gradients of keys and values [B, H, N, d] from the sums of what tokens and windows were sent."""
    B, H, N, d = like.shape
    d_k, d_v = (draft.empty(B, N, H, d, dtype=like.dtype).transpose(1, 2) for _ in range(2))
    channels = block_d(like)
    block_t = max(16, 4096 // channels)
    draft.launch(
        key_gradients_kernel,
        (triton.cdiv(N, block_t), B * H),
        *(sums[0], sums[1], mean_sums[0], mean_sums[1], d_k, d_v, *d_k.strides[:3]),
        *(H, N, *problem.layout.grid, problem.layout.prefix, problem.windows, problem.summary),
        HEAD_DIM=d,
        BLOCK_T=block_t,
        BLOCK_D=channels,
    )
    return d_k, d_v


def _entries_by_token(
    q: Tensor, indices: Tensor, lengths: Sequence[Tensor], problem: Problem
) -> tuple[Tensor, Tensor]:
    """Which entries of the lists name each token: their order by token, and where each token begins.

    Args:
        q: queries.
        indices: int32 [B, H, tiles, keys].
        lengths: int32 [B, H, tiles] of the lists, if they are packed.
        problem: the sizes.
    """
    B, H, tiles, keys = indices.shape
    N = problem.layout.tokens
    every = torch.arange(N, device=indices.device)
    is_key = (indices >= 0) & (indices < N)
    if lengths:
        is_key &= torch.arange(keys, device=indices.device) < lengths[0][..., None]
    listed = torch.where(is_key, indices, N).long().unsqueeze(3)
    listed = listed.expand(B, H, tiles, problem.parts(q), keys).flatten(2).flatten(0, 1)
    prefix = every.repeat(problem.prefix_parts(q)).expand(B * H, -1)
    token, order = torch.cat([listed, prefix], 1).sort(dim=1, stable=True)
    bounds = torch.arange(N + 1, device=indices.device).expand(B * H, -1).contiguous()
    return order, torch.searchsorted(token.contiguous(), bounds)
