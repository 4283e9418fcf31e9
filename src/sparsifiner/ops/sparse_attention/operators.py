"""Sparse attention as an operator of torch: autograd, and what compilers, exporters and flop counters see."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsifiner.geometry.grid import layout_of
from sparsifiner.ops.arguments import AttendArguments
from sparsifiner.ops.operator import Operator

_ROOM = "sparsifiner.ops.sparse_attention"


def _fake_attend(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, _, _, _, means, geometry, _, training = AttendArguments(*arguments[:-1])
    B, H, N, d = q.shape
    out = q.new_empty(B, N, H, d).transpose(1, 2)
    if not training:
        return out, q.new_empty(0), q.new_empty(0), q.new_empty(0)
    layout, (tile, summary) = layout_of(geometry), geometry[3:]
    windows = layout.squares(summary) if summary else 0
    counts = k.new_empty(B, H, layout.squares(tile), windows, dtype=count_dtype(geometry))
    computed = k.new_empty(2, B, H, windows, d) if means is None else k.new_empty(0)
    return out, q.new_empty(B, H, N, dtype=torch.float32), counts, computed


def count_dtype(geometry: Sequence[int]) -> torch.dtype:
    """Of the tokens of a window that a list lacks."""
    patches = layout_of(geometry).square_patches(geometry[4])
    return torch.uint8 if patches <= torch.iinfo(torch.uint8).max else torch.int32


def _fake_backward(d_out: Tensor, q: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, d = q.shape
    d_q, d_k, d_v = (q.new_empty(B, N, H, d).transpose(1, 2) for _ in range(3))
    return d_q, d_k, d_v


def _attend_flops(
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    indices: torch.Size,
    ascending: bool,
    means: Any,
    geometry: Sequence[int],
    *unused: Any,
) -> int:
    return attention_flops(q, indices, geometry)


def _backward_flops(
    d_out: torch.Size,
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    indices: torch.Size,
    *others: Any,
) -> int:
    return attention_flops(q, indices, others[4], products=5)


def attention_flops(q: torch.Size, indices: torch.Size, geometry: Sequence[int], products: int = 2) -> int:
    """Operations of the products that every listed key, summary and prefix query takes part in."""
    B, H, N, d = q
    layout, summary = layout_of(geometry), geometry[4]
    windows = layout.squares(summary) if summary else 0
    visits = layout.patches * (indices[-1] + windows) + layout.prefix * N
    return 2 * products * int(B * H * visits * d)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, indices, ctx.ascending, means, ctx.geometry, ctx.scale, training, ctx.backend = inputs
    if not training:
        raise ValueError("sparsifiner::attend: gradients are wanted of a call that kept nothing for them")
    out, log_weight, missing, computed = output
    ctx.save_for_backward(q, k, v, indices, out, log_weight, missing, computed if means is None else means)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    without_gradient = (None,) * 7
    if d_out is None:
        return (None, None, None, *without_gradient)
    q, k, v, indices, *saved = ctx.saved_tensors
    given = (d_out, q, k, v, indices, *saved, ctx.geometry, ctx.scale, ctx.ascending, ctx.backend)
    return (*attend_backward(*given), *without_gradient)


# Attention over lists and summaries; in training beside the result what its backward reads: log2 of the
# denominators, counts of the tokens that lists lack, and the means that were computed; else nothing.
attend = Operator(
    "attend(Tensor q, Tensor k, Tensor v, Tensor indices, bool ascending, Tensor? means, SymInt[] geometry, "
    "float scale, bool training, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    {"triton": f"{_ROOM}.triton_backend:attend_lists", "cpu": f"{_ROOM}.cpu_backend:attend"},
    _fake_attend,
    _attend_flops,
    (_backward, _save_for_backward),
)
# Gradients of q, k and v, in a fixed order where torch is asked for deterministic algorithms; behind the
# lists the result and what was kept with it.
attend_backward = Operator(
    "attend_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor indices, Tensor out, "
    "Tensor log_weight, Tensor missing, Tensor means, SymInt[] geometry, float scale, bool ascending, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    {"triton": f"{_ROOM}.triton_gradients:attend_backward"},
    _fake_backward,
    _backward_flops,
)
