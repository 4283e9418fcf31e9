"""Our kernels in Triton and C++ as operators of torch: for autograd, compilers, exporters, flop counters."""

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsifiner.layout import TokenLayout
from sparsifiner.ops.backend import HAS_TRITON
from sparsifiner.ops.select import cpu_backend as cpu_select
from sparsifiner.ops.sparse_attention import cpu_backend as cpu_attention

# Keys, forced ones aside, that the fused low-rank selection takes: a program holds a row of scores.
LOWRANK_TOKENS = 16_384
LARGEST_HEAD_DIM = 128
# Basis size times head dim, and reduced head dim, that the fused low-rank selection holds in registers.
LARGEST_LOWRANK_BASIS = 64 * 64
LARGEST_REDUCED_DIM = 32
# Windows whose tokens one program counts.
LARGEST_WINDOWS = 4_096
# Head dims of the native kernels: whole vectors of the widest instruction set.
CPU_HEAD_DIM_STEP = 16
# Batch elements times heads: they take the second axis of a launch.
LARGEST_PAIRS = 65_535

if HAS_TRITON:
    from sparsifiner.ops.select import triton_backend as triton_select
    from sparsifiner.ops.select import triton_lowrank, triton_tiles
    from sparsifiner.ops.sparse_attention import triton_backend as triton_attention

    assert triton_select.LARGEST_BLOCK == LOWRANK_TOKENS


def why_no_kernel(backend: str, q: Tensor) -> str:
    """Why kernels of "triton" or "cpu" do not take queries [B, H, N, d]; empty if they do."""
    if backend == "cpu":
        return _why_no_cpu_kernel(q)
    if q.dtype == torch.float64:
        return "computes in fp32, got fp64"
    if q.shape[-1] % 8 or q.shape[-1] > LARGEST_HEAD_DIM:
        return f"takes head dims that are multiples of 8 up to {LARGEST_HEAD_DIM}, got {q.shape[-1]}"
    if q.shape[0] * q.shape[1] > LARGEST_PAIRS:
        return f"takes at most {LARGEST_PAIRS} heads in a batch, got {q.shape[0]} x {q.shape[1]}"
    return ""


def _why_no_cpu_kernel(q: Tensor) -> str:
    if q.dtype not in {torch.float32, torch.bfloat16}:
        return f"takes fp32 and bf16, got {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] % CPU_HEAD_DIM_STEP or not q.shape[-1]:
        return f"takes head dims that are multiples of {CPU_HEAD_DIM_STEP}, got {q.shape[-1]}"
    return ""


@torch.library.custom_op("sparsifiner::select_topk", mutates_args=())
def select_topk(scores: Tensor, budget: int, forced: int, own: Tensor) -> Tensor:
    """See `sparsifiner.ops.select_topk`; scores [B, H, rows, N], own [rows, m]."""
    with _device_of(scores):
        return triton_select.select_topk(scores, budget, forced, own)


@select_topk.register_fake
def _(scores: Tensor, budget: int, forced: int, own: Tensor) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], budget), dtype=torch.int32)


@torch.library.custom_op("sparsifiner::select_lowrank", mutates_args=())
def select_lowrank(
    q: Tensor,
    k: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    down: Tensor,
    basis: Tensor,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    temperature: float,
    coef_topk: int,
    budget: int,
    forced: int,
) -> Tensor:
    """Lists of the low-rank predictor's scores; q and k [B, H, N, d], weights as `LowRankWeights`."""
    weights = (query_weight, query_bias, key_weight, key_bias, down, basis)
    with _device_of(q):
        return triton_lowrank.select_lowrank(
            *(q, k, triton_lowrank.LowRankWeights(*weights)),
            *(TokenLayout((grid_height, grid_width), prefix), tile),
            temperature=temperature,
            coef_topk=coef_topk,
            budget=budget,
            forced=forced,
        )


@select_lowrank.register_fake
def _(
    q: Tensor,
    k: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    down: Tensor,
    basis: Tensor,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    temperature: float,
    coef_topk: int,
    budget: int,
    forced: int,
) -> Tensor:
    rows = TokenLayout((grid_height, grid_width), prefix).squares(tile)
    return q.new_empty((*q.shape[:2], rows, budget), dtype=torch.int32)


@torch.library.custom_op("sparsifiner::select_pooled", mutates_args=())
def select_pooled(
    q: Tensor,
    k: Tensor,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    budget: int,
    forced: int,
) -> Tensor:
    """Lists of the scores tile-mean q · k; q and k [B, H, N, d]."""
    layout = TokenLayout((grid_height, grid_width), prefix)
    with _device_of(q):
        return triton_tiles.select_pooled(q, k, layout, tile, budget, forced)


@select_pooled.register_fake
def _(
    q: Tensor,
    k: Tensor,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    budget: int,
    forced: int,
) -> Tensor:
    rows = TokenLayout((grid_height, grid_width), prefix).squares(tile)
    return q.new_empty((*q.shape[:2], rows, budget), dtype=torch.int32)


@torch.library.custom_op("sparsifiner::select_impact", mutates_args=())
def select_impact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    pool: int,
    summary: int,
    scale: float,
    budget: int,
    forced: int,
) -> tuple[Tensor, Tensor]:
    """Lists of the scores of `ImpactScorer`, and window means as `attend` takes; q, k and v [B, H, N, d]."""
    layout = TokenLayout((grid_height, grid_width), prefix)
    with _device_of(q):
        return triton_tiles.select_impact(q, k, v, layout, tile, pool, summary, scale, budget, forced)


@select_impact.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    pool: int,
    summary: int,
    scale: float,
    budget: int,
    forced: int,
) -> tuple[Tensor, Tensor]:
    layout = TokenLayout((grid_height, grid_width), prefix)
    indices = q.new_empty((*q.shape[:2], layout.squares(tile), budget), dtype=torch.int32)
    return indices, k.new_empty(2, *k.shape[:2], layout.squares(summary), k.shape[-1])


@torch.library.custom_op("sparsifiner::attend", mutates_args=())
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    means: Tensor | None,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    summary: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention over lists and summaries (side 0 for none): the result and what its backward needs.

    Means of keys and values over the windows [2, B, H, windows, d] are taken as they are, or computed.
    """
    problem = _problem(grid_height, grid_width, prefix, tile, summary, scale)
    with _device_of(q):
        return triton_attention.attend(q, k, v, indices, means, problem)


@attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    means: Tensor | None,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    summary: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, H, N, d = q.shape
    problem = _problem(grid_height, grid_width, prefix, tile, summary, scale)
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
    with _device_of(q):
        return triton_attention.attend_backward(
            *(d_out, q, k, v, indices, (out, log_weight, means, missing)),
            _problem(grid_height, grid_width, prefix, tile, summary, scale),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


@attend_backward.register_fake
def _(d_out: Tensor, q: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    B, H, N, d = q.shape
    d_q, d_k, d_v = (q.new_empty(B, N, H, d).transpose(1, 2) for _ in range(3))
    return d_q, d_k, d_v


@torch.library.custom_op("sparsifiner::select_topk_cpu", mutates_args=(), device_types="cpu")
def select_topk_cpu(scores: Tensor, budget: int, forced: int, own: Tensor) -> Tensor:
    """As `select_topk`, by the native library."""
    return cpu_select.select_topk(scores, budget, forced, own)


@select_topk_cpu.register_fake
def _(scores: Tensor, budget: int, forced: int, own: Tensor) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], budget), dtype=torch.int32)


@torch.library.custom_op("sparsifiner::select_lowrank_cpu", mutates_args=(), device_types="cpu")
def select_lowrank_cpu(
    q: Tensor,
    k: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    down: Tensor,
    basis: Tensor,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    temperature: float,
    coef_topk: int,
    budget: int,
    forced: int,
) -> Tensor:
    """As `select_lowrank`, by the native library."""
    return cpu_select.predict_lists(
        *(q, k, (query_weight, query_bias, key_weight, key_bias, down), basis),
        *(TokenLayout((grid_height, grid_width), prefix), tile),
        temperature=temperature,
        coef_topk=coef_topk,
        budget=budget,
        forced=forced,
    )


@select_lowrank_cpu.register_fake
def _(
    q: Tensor,
    k: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    down: Tensor,
    basis: Tensor,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    temperature: float,
    coef_topk: int,
    budget: int,
    forced: int,
) -> Tensor:
    rows = TokenLayout((grid_height, grid_width), prefix).squares(tile)
    return q.new_empty((*q.shape[:2], rows, budget), dtype=torch.int32)


@torch.library.custom_op("sparsifiner::select_impact_cpu", mutates_args=(), device_types="cpu")
def select_impact_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    pool: int,
    summary: int,
    scale: float,
    budget: int,
    forced: int,
) -> Tensor:
    """As `select_impact`, by the native library."""
    layout = TokenLayout((grid_height, grid_width), prefix)
    return cpu_select.select_impact(q, k, v, layout, tile, pool, summary, scale, budget, forced)


@select_impact_cpu.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    pool: int,
    summary: int,
    scale: float,
    budget: int,
    forced: int,
) -> Tensor:
    rows = TokenLayout((grid_height, grid_width), prefix).squares(tile)
    return q.new_empty((*q.shape[:2], rows, budget), dtype=torch.int32)


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
    return cpu_attention.attend(q, k, v, indices, layout, tile, summary, scale)


@attend_cpu.register_fake
def _(q: Tensor, *unused: Any) -> Tensor:
    B, H, N, d = q.shape
    return q.new_empty(B, N, H, d).transpose(1, 2)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, indices, means, *problem = inputs
    out, log_weight, computed, missing = output
    ctx.save_for_backward(q, k, v, indices, out, log_weight, computed if means is None else means, missing)
    ctx.problem = problem
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_out: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    without_gradient = (None,) * (2 + len(ctx.problem))
    if d_out is None:
        return (None, None, None, *without_gradient)
    return (*attend_backward(d_out, *ctx.saved_tensors, *ctx.problem), *without_gradient)


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
    q: torch.Size, k: torch.Size, v: torch.Size, indices: torch.Size, means: Any, *problem: Any, **unused: Any
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
    return _attend_flops(q, k, v, indices, *rest[4:], products=5)


@register_flop_formula(torch.ops.sparsifiner.select_pooled)
def _(
    q: torch.Size,
    k: torch.Size,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    *rest: Any,
    **unused: Any,
) -> int:
    B, H, N, d = q
    return 2 * int(B * H * TokenLayout((grid_height, grid_width), prefix).squares(tile) * N * d)


@register_flop_formula([torch.ops.sparsifiner.select_impact, torch.ops.sparsifiner.select_impact_cpu])
def _(
    q: torch.Size,
    k: torch.Size,
    v: torch.Size,
    grid_height: int,
    grid_width: int,
    prefix: int,
    tile: int,
    pool: int,
    summary: int,
    *rest: Any,
    **unused: Any,
) -> int:
    B, H, N, d = q
    layout = TokenLayout((grid_height, grid_width), prefix)
    mass_keys = 0 if pool == tile else prefix + layout.squares(summary)
    return 2 * int(B * H * layout.squares(pool) * (N + mass_keys) * d)


@register_flop_formula([torch.ops.sparsifiner.select_lowrank, torch.ops.sparsifiner.select_lowrank_cpu])
def _(q: torch.Size, k: torch.Size, query_weight: torch.Size, *rest: Any, **unused: Any) -> int:
    B, H, N, d = q
    down, (grid_height, grid_width, prefix, tile, _, coef_topk) = rest[3], rest[5:11]
    rows = TokenLayout((grid_height, grid_width), prefix).squares(tile)
    reduced_dim, basis = query_weight[0], down[1]
    # W_downᵀ k comes first, so keys are projected after they were summed up
    key_down = N * basis * d + basis * d * reduced_dim
    rows_of_scores = rows * (d * reduced_dim + basis * reduced_dim + coef_topk * N)
    return 2 * int(B * H * (key_down + rows_of_scores))


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Triton launches on the current device, which need not be that of the inputs."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _problem(
    grid_height: int, grid_width: int, prefix: int, tile: int, summary: int, scale: float
) -> "triton_attention.Problem":
    layout = TokenLayout((grid_height, grid_width), prefix)
    return triton_attention.Problem(layout, tile, summary, scale)
