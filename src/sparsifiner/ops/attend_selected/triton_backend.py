"""Selection and attention in Triton: the launches of both in one program."""

from collections.abc import Sequence

from torch import Tensor

from sparsifiner.ops.program import Buffer, Draft, operation
from sparsifiner.ops.select.triton_backend import is_one_block
from sparsifiner.ops.select.triton_tiles import select_impact, select_pooled
from sparsifiner.ops.sparse_attention.triton_backend import attend, begin
from sparsifiner.ops.sparse_attention.triton_problem import Problem
from sparsifiner.ops.triton_counts import Begun


def attend_pooled(
    q: Tensor, k: Tensor, v: Tensor, geometry: Sequence[int], scale: float, budget: int, forced: int
) -> Tensor:
    """As `select_pooled` and `attend` say: [B, H, N, d] of tensors of any strides."""
    return _by_pooled(q, k, v, sizes=(tuple(geometry), scale, budget, forced))[0]


def attend_impact(
    q: Tensor, k: Tensor, v: Tensor, geometry: Sequence[int], scale: float, budget: int, forced: int
) -> Tensor:
    """As `select_impact` and `attend` say: [B, H, N, d] of tensors of any strides."""
    return _by_impact(q, k, v, sizes=(tuple(geometry), scale, budget, forced))[0]


Sizes = tuple[tuple[int, ...], float, int, int]


@operation
def _by_pooled(draft: Draft, q: Buffer, k: Buffer, v: Buffer, *, sizes: Sizes) -> tuple[Buffer, ...]:
    geometry, scale, budget, forced = sizes
    begun = _begun(draft, q, geometry, scale, forced)
    (indices,) = select_pooled.write(
        draft, q, k, geometry=geometry[:4], budget=budget, forced=forced, begun=begun
    )
    return _attend(draft, (q, k, v, indices, None), geometry, scale, begun)


@operation
def _by_impact(draft: Draft, q: Buffer, k: Buffer, v: Buffer, *, sizes: Sizes) -> tuple[Buffer, ...]:
    (*of_selection, summary), scale, budget, forced = sizes
    geometry = (*of_selection[:4], summary)
    begun = _begun(draft, q, geometry, scale, forced)
    indices, means = select_impact.write(
        *(draft, q, k, v),
        geometry=tuple(of_selection),
        scale=scale,
        budget=budget,
        forced=forced,
        begun=begun,
    )
    return _attend(draft, (q, k, v, indices, means if summary else None), geometry, scale, begun)


def _begun(draft: Draft, q: Buffer, geometry: tuple[int, ...], scale: float, forced: int) -> Begun | None:
    """What attention begins with, if the selection can make it."""
    return begin(draft, q, Problem(geometry, scale, True)) if is_one_block(q.shape[2] - forced) else None


def _attend(
    draft: Draft,
    inputs: tuple[Buffer | None, ...],
    geometry: tuple[int, ...],
    scale: float,
    begun: Begun | None,
) -> tuple[Buffer, ...]:
    return attend.write(
        draft, *inputs, geometry=geometry, scale=scale, ascending=True, training=False, begun=begun
    )
