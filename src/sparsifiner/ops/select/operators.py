"""Selections as operators of torch: what compilers, exporters and flop counters see of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsifiner.geometry.grid import layout_of
from sparsifiner.ops.arguments import LowRankArguments
from sparsifiner.ops.operator import Operator

_ROOM = "sparsifiner.ops.select"


def _lists(q: Tensor, geometry: Sequence[int], budget: int) -> Tensor:
    """Lists of the right shape."""
    rows = layout_of(geometry).squares(geometry[3])
    return q.new_empty((*q.shape[:2], rows, budget), dtype=torch.int32)


def _fake_topk(scores: Tensor, budget: int, *unused: Any) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], budget), dtype=torch.int32)


def _fake_lowrank(*arguments: Any) -> Tensor:
    given = LowRankArguments(*arguments[:-1])
    return _lists(given.q, given.geometry, given.budget)


def _fake_pooled(q: Tensor, k: Tensor, geometry: Any, budget: int, *unused: Any) -> Tensor:
    return _lists(q, geometry, budget)


def _fake_impact(
    q: Tensor, k: Tensor, v: Tensor, geometry: Any, scale: float, budget: int, forced: int, backend: str
) -> tuple[Tensor, Tensor]:
    windows = layout_of(geometry).squares(geometry[5]) if backend == "triton" else 0
    return _lists(q, geometry, budget), k.new_empty(2, *k.shape[:2], windows, k.shape[-1])


def pooled_flops(q: torch.Size, k: torch.Size, geometry: Sequence[int], *unused: Any) -> int:
    """Operations of all products of tiles and keys."""
    B, H, N, d = q
    return 2 * int(B * H * layout_of(geometry).squares(geometry[3]) * N * d)


def impact_flops(q: torch.Size, k: torch.Size, v: torch.Size, geometry: Sequence[int], *unused: Any) -> int:
    """Operations of all products of squares with keys, and with prefix and windows for their mass."""
    B, H, N, d = q
    layout, (tile, pool, summary) = layout_of(geometry), geometry[3:]
    mass_keys = 0 if pool == tile else layout.prefix + layout.squares(summary)
    return 2 * int(B * H * layout.squares(pool) * (N + mass_keys) * d)


def _lowrank_flops(*arguments: Any) -> int:
    (B, H, N, d), _, (reduced_dim, _), *others = arguments
    down, (geometry, _, coef_topk) = others[3], others[5:8]
    rows, basis = layout_of(geometry).squares(geometry[3]), down[1]
    # W_downᵀ k comes first, so keys are projected after they were summed up
    key_down = N * basis * d + basis * d * reduced_dim
    rows_of_scores = rows * (d * reduced_dim + basis * reduced_dim + coef_topk * N)
    return 2 * int(B * H * (key_down + rows_of_scores))


select_topk = Operator(
    "select_topk(Tensor scores, SymInt budget, SymInt forced, Tensor own, str backend) -> Tensor",
    {"triton": f"{_ROOM}.triton_backend:select_topk", "cpu": f"{_ROOM}.cpu_backend:select_topk"},
    _fake_topk,
)
select_lowrank = Operator(
    "select_lowrank(Tensor q, Tensor k, Tensor query_weight, Tensor query_bias, Tensor key_weight, "
    "Tensor key_bias, Tensor down, Tensor basis, SymInt[] geometry, float temperature, SymInt coef_topk, "
    "SymInt budget, SymInt forced, str backend) -> Tensor",
    {"triton": f"{_ROOM}.triton_lowrank:lists_by_lowrank", "cpu": f"{_ROOM}.cpu_backend:predict_lists"},
    _fake_lowrank,
    _lowrank_flops,
)
select_pooled = Operator(
    "select_pooled(Tensor q, Tensor k, SymInt[] geometry, SymInt budget, SymInt forced, str backend) "
    "-> Tensor",
    {"triton": f"{_ROOM}.triton_tiles:lists_by_pooled"},
    _fake_pooled,
    pooled_flops,
)
# geometry: rows, columns, prefix and the sides of a tile, of its squares and of a window; beside the lists
# means of keys and values over the windows, as `attend` takes them, of no window where native code selects
select_impact = Operator(
    "select_impact(Tensor q, Tensor k, Tensor v, SymInt[] geometry, float scale, SymInt budget, "
    "SymInt forced, str backend) -> (Tensor, Tensor)",
    {"triton": f"{_ROOM}.triton_tiles:lists_by_impact", "cpu": f"{_ROOM}.cpu_backend:select_impact"},
    _fake_impact,
    impact_flops,
)
