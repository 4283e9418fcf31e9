"""Attention kernels in Triton and C++ as operators of torch: autograd, compilers, exporters, flop counts."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops.backend import HAS_TRITON
from sparsifiner.ops.kernels import device_of
from sparsifiner.ops.sparse_attention import cpu_backend

# Windows whose tokens one program counts.
LARGEST_WINDOWS = 4_096

if HAS_TRITON:
    from sparsifiner.ops.sparse_attention import triton_backend


@torch.library.custom_op("sparsifiner::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    ascending: bool,
    means: Tensor | None,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    summary: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention over lists and summaries (side 0 for none): the result and what its backward needs.

    `ascending` tells that lists ascend as those of `select_topk` do; they are then read as they are. Means of
    keys and values over the windows [2, B, H, windows, d] are taken as they are, or computed.
    """
    problem = _problem(grid_height, grid_width, prefix, tile, summary, scale, ascending)
    with device_of(q):
        return triton_backend.attend(q, k, v, indices, means, problem)


@attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    ascending: bool,
    means: Tensor | None,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    summary: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, N, d = q.shape
    problem = _problem(grid_height, grid_width, prefix, tile, summary, scale, ascending)
    return (
        q.new_empty(B, N, H, d).transpose(1, 2),
        q.new_empty(B, H, N, dtype=torch.float32),
        k.new_empty(2, B, H, problem.windows, d) if means is None else k.new_empty(0),
        k.new_empty(B, H, problem.rows, problem.windows, dtype=problem.count_dtype),
    )


@torch.library.custom_op("sparsifiner::attend_backward", mutates_args=())
def attend_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    ascending: bool,
    out: Tensor,
    log_weight: Tensor,
    means: Tensor,
    missing: Tensor,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    summary: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; in a fixed order where torch is asked for deterministic algorithms."""
    with device_of(q):
        return triton_backend.attend_backward(
            *(d_out, q, k, v, indices, (out, log_weight, means, missing)),
            _problem(grid_height, grid_width, prefix, tile, summary, scale, ascending),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


@attend_backward.register_fake
def _(d_out: Tensor, q: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, d = q.shape
    d_q, d_k, d_v = (q.new_empty(B, N, H, d).transpose(1, 2) for _ in range(3))
    return d_q, d_k, d_v


@torch.library.custom_op("sparsifiner::attend_cpu", mutates_args=(), device_types="cpu")
def attend_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    summary: int,
    scale: float,
) -> Tensor:
    """As `attend`, by the native library: the result alone, without gradients."""
    layout = TokenLayout((grid_height, grid_width), prefix)
    return cpu_backend.attend(q, k, v, indices, layout, tile, summary, scale)


@attend_cpu.register_fake
def _(q: Tensor, *unused: Any) -> Tensor:
    B, H, N, d = q.shape
    return q.new_empty(B, N, H, d).transpose(1, 2)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, indices, ctx.ascending, means, *problem = inputs
    out, log_weight, computed, missing = output
    ctx.save_for_backward(q, k, v, indices, out, log_weight, computed if means is None else means, missing)
    ctx.problem = problem
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    without_gradient = (None,) * (3 + len(ctx.problem))
    if d_out is None:
        return (None, None, None, *without_gradient)
    q, k, v, indices, *saved = ctx.saved_tensors
    gradients = attend_backward(d_out, q, k, v, indices, ctx.ascending, *saved, *ctx.problem)
    return (*gradients, *without_gradient)


attend.register_autograd(_backward, setup_context=_save_for_backward)


def _attend_flops(
    q: torch.Size, k: torch.Size, v: torch.Size, indices: torch.Size, *problem: Any, products: int = 2
) -> int:
    """Operations of the products that every listed key, summary and prefix query takes part in."""
    B, H, N, d = q
    grid_height, grid_width, prefix, _, summary = problem[:5]
    layout = TokenLayout((grid_height, grid_width), prefix)
    windows = layout.squares(summary) if summary else 0
    visits = layout.patches * (indices[-1] + windows) + prefix * N
    return 2 * products * int(B * H * visits * d)


@register_flop_formula(torch.ops.sparsifiner.attend)
def _(
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    indices: torch.Size,
    ascending: bool,
    means: Any,
    *problem: Any,
    **unused: Any,
) -> int:
    return _attend_flops(q, k, v, indices, *problem)


@register_flop_formula(torch.ops.sparsifiner.attend_cpu)
def _(*shapes: Any, **unused: Any) -> int:
    return _attend_flops(*shapes)


@register_flop_formula(torch.ops.sparsifiner.attend_backward)
def _(
    d_out: torch.Size,
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    indices: torch.Size,
    *rest: Any,
    **unused: Any,
) -> int:
    return _attend_flops(q, k, v, indices, *rest[5:], products=5)


def _problem(
    grid_height: int, grid_width: int, prefix: int, tile: int, summary: int, scale: float, ascending: bool
) -> "triton_backend.Problem":
    layout = TokenLayout((grid_height, grid_width), prefix)
    return triton_backend.Problem(layout, tile, summary, scale, ascending)
