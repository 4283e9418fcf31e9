"""Selections with the attention that follows them, as operators of torch.

Each is a selection of `ops.select` and `ops.sparse_attention`'s attention in inference: one program, whose
lists never leave its workspace. Geometries end in the side of a window of summaries, 0 for none.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsifiner.geometry.grid import layout_of
from sparsifiner.ops.operator import Operator
from sparsifiner.ops.select.operators import impact_flops, pooled_flops
from sparsifiner.ops.sparse_attention.operators import attention_flops

_HOME = "sparsifiner.ops.attend_selected.triton_backend"


def _fake(q: Tensor, *unused: Any) -> Tensor:
    B, H, N, d = q.shape
    return q.new_empty(B, N, H, d).transpose(1, 2)


def _attention(q: torch.Size, geometry: Sequence[int], budget: int) -> int:
    """Operations of attention over lists of that length; the geometry is that of `attend`."""
    lists = torch.Size((*q[:2], layout_of(geometry).squares(geometry[3]), budget))
    return attention_flops(q, lists, geometry)


def _pooled_flops(*arguments: Any) -> int:
    q, k, _, geometry, _, budget = arguments[:6]
    return pooled_flops(q, k, geometry[:4]) + _attention(q, geometry, budget)


def _impact_flops(*arguments: Any) -> int:
    q, k, v, geometry, _, budget = arguments[:6]
    attention = _attention(q, (*geometry[:4], geometry[6]), budget)
    return impact_flops(q, k, v, geometry[:6]) + attention


# geometry: rows, columns, prefix and the sides of a tile and of a window of summaries
attend_pooled = Operator(
    "attend_pooled(Tensor q, Tensor k, Tensor v, SymInt[] geometry, float scale, SymInt budget, "
    "SymInt forced, str backend) -> Tensor",
    {"triton": f"{_HOME}:attend_pooled"},
    _fake,
    _pooled_flops,
)
# geometry: that of `select_impact` and the side of a window of summaries
attend_impact = Operator(
    "attend_impact(Tensor q, Tensor k, Tensor v, SymInt[] geometry, float scale, SymInt budget, "
    "SymInt forced, str backend) -> Tensor",
    {"triton": f"{_HOME}:attend_impact"},
    _fake,
    _impact_flops,
)
