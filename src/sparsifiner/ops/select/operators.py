"""Selection kernels in Triton and C++ as operators of torch: compilers, exporters, flop counters."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops.backend import HAS_TRITON
from sparsifiner.ops.kernels import device_of
from sparsifiner.ops.select import cpu_backend

# Keys, forced ones aside, that the fused low-rank selection takes: a program holds a row of scores.
LOWRANK_TOKENS = 16_384
# Basis size times head dim, and reduced head dim, that the fused low-rank selection holds in registers.
LARGEST_LOWRANK_BASIS = 64 * 64
LARGEST_REDUCED_DIM = 32

if HAS_TRITON:
    from sparsifiner.ops.select import triton_backend, triton_lowrank, triton_tiles

    assert triton_backend.LARGEST_BLOCK == LOWRANK_TOKENS


@torch.library.custom_op("sparsifiner::select_topk", mutates_args=())
def select_topk(scores: Tensor, budget: int, forced: int, own: Tensor) -> Tensor:
    """See `sparsifiner.ops.select_topk`; scores [B, H, rows, N], own [rows, m]."""
    with device_of(scores):
        return triton_backend.select_topk(scores, budget, forced, own)


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
    with device_of(q):
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
    with device_of(q):
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
    with device_of(q):
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


@torch.library.custom_op("sparsifiner::select_topk_cpu", mutates_args=(), device_types="cpu")
def select_topk_cpu(scores: Tensor, budget: int, forced: int, own: Tensor) -> Tensor:
    """As `select_topk`, by the native library."""
    return cpu_backend.select_topk(scores, budget, forced, own)


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
    return cpu_backend.predict_lists(
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
    return cpu_backend.select_impact(q, k, v, layout, tile, pool, summary, scale, budget, forced)


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
