"""Sparse attention in Triton: launches of the forward pass."""

from math import prod
from typing import Any

import torch
from torch import Tensor

from sparsifiner import tuned
from sparsifiner.ops.arguments import AttendArguments
from sparsifiner.ops.program import Buffer, Draft, operation
from sparsifiner.ops.sparse_attention.operators import count_dtype
from sparsifiner.ops.sparse_attention.triton_forward import attend_kernel
from sparsifiner.ops.sparse_attention.triton_problem import (
    LOG2_E,
    Problem,
    block_d,
    blocks,
    lists_by_tile,
)
from sparsifiner.ops.triton_counts import Begun, missing_kernel
from sparsifiner.ops.triton_means import square_means


def attend_lists(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `attend` says, of `AttendArguments`; nothing takes the place of what it does not return."""
    q, k, v, indices, ascending, means, geometry, scale, training = AttendArguments(*arguments)
    options = {"geometry": tuple(geometry), "scale": scale, "ascending": ascending, "training": training}
    out, *saved = attend(q, k, v, indices.contiguous(), means, **options)
    log_weight, missing, computed = (*saved, *(q.new_empty(0) for _ in range(3 - len(saved))))
    return out, log_weight, missing, computed


@operation
def attend(
    draft: Draft,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    indices: Buffer,
    means: Buffer | None,
    *,
    geometry: tuple[int, ...],
    scale: float,
    ascending: bool,
    training: bool,
    begun: Begun | None = None,
) -> tuple[Buffer, ...]:
    """The forward pass.

    Args:
        draft: what is written to.
        q: [B, H, N, d] with contiguous rows, as are `k` and `v`.
        k: keys.
        v: values.
        indices: int32 [B, H, rows, keys].
        means: mean keys and values of the windows [2, B, H, W, d], None if they are still to be computed.
        geometry: of the layout, with the sides of a tile and of a window, 0 for no summaries.
        scale: factor of the logits.
        ascending: see `Problem`.
        training: return what the backward pass reads, too.
        begun: what the selection has counted, None if it is still to be done.

    Returns:
        `out` [B, H, N, d]; in training also log2 of the softmax's denominators, fp32 [B, H, N], the tokens of
        each window that each list lacks [B, H, rows, W], and the means if they were not given.
    """
    problem = Problem(geometry, scale, ascending)
    B, H, N, d = q.shape
    given = means is not None
    if means is None:
        means = _means(draft, k, v, problem)
    begun = begun or _begin(draft, indices, problem, q)
    lists = lists_by_tile(draft, indices, problem)
    out = draft.empty(B, N, H, d, dtype=q.dtype).transpose(1, 2)
    log_weight = draft.empty(B, H, N, dtype=torch.float32)
    prefix, splits = problem.layout.prefix, problem.splits
    split_out = draft.empty(B, H, splits, prefix, d, dtype=torch.float32)
    split_log_weight = draft.empty(B, H, splits, prefix, dtype=torch.float32)
    draft.launch(
        attend_kernel,
        problem.grid(q),
        *(q, k, v, *lists, begun.every, means[0], means[1], begun.missing, out, log_weight),
        *(split_out, split_log_weight, begun.arrived),
        *(*q.strides[:3], *k.strides[:3], *v.strides[:3], *out.strides[:3]),
        *(H, N, *problem.layout.grid, prefix, problem.tiles, lists.indices.shape[-1]),
        *(problem.windows, splits, scale * LOG2_E),
        SUMMARY_STAGES=2,
        **blocks(q, problem),
        **_forward_options(q, problem),
    )
    if not training:
        return (out,)
    return (out, log_weight, begun.missing) if given else (out, log_weight, begun.missing, means)


def _means(draft: Draft, k: Buffer, v: Buffer, problem: Problem) -> Buffer:
    """Mean keys and values of the windows [2, B, H, W, d]."""
    if problem.summary:
        return square_means(draft, k, problem.layout, problem.summary, v)
    return draft.empty(2, *k.shape[:2], 0, k.shape[3], dtype=k.dtype)


def begin(draft: Draft, q: Buffer, problem: Problem) -> Begun:
    """Memory for what attention begins with, which a launch is still to write."""
    return Begun.make(draft, q, problem.geometry, count_dtype(problem.geometry), problem.prefix_parts(q))


def _begin(draft: Draft, indices: Buffer, problem: Problem, q: Buffer) -> Begun:
    """What attention begins with, by a launch of its own."""
    begun, layout = begin(draft, q, problem), problem.layout
    draft.launch(
        missing_kernel,
        (prod(indices.shape[:3]),),
        *(indices, *begun.since(0), indices.shape[-1], layout.tokens, *layout.grid, layout.prefix),
        *begun.sizes(),
        ASCENDING=problem.ascending,
        num_warps=2,
        **begun.blocks(),
    )
    return begun


def _forward_options(q: Buffer, problem: Problem) -> dict[str, int]:
    """Registers that let a fourth program of 64 queries and head dim 64 onto a multiprocessor."""
    is_small = problem.block_m(q) * block_d(q) <= 64 * 64 and q.dtype != torch.float32
    return {"maxnreg": tuned.ATTEND_REGISTERS} if is_small and not problem.packed else {}
