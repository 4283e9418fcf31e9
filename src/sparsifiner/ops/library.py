"""Our kernels as operators of torch, so that compilers, exporters and profilers see them."""

import torch
from torch import Tensor

from sparsifiner.ops.backend import HAS_TRITON

if HAS_TRITON:
    from sparsifiner.ops.select import triton_backend as triton_select


@torch.library.custom_op("sparsifiner::select_topk", mutates_args=())
def select_topk(scores: Tensor, budget: int, forced: int, own: Tensor) -> Tensor:
    """See `sparsifiner.ops.select_topk`; scores [B, H, rows, N], own [rows, m]."""
    return triton_select.select_topk(scores, budget, forced, own)


@select_topk.register_fake
def _(scores: Tensor, budget: int, forced: int, own: Tensor) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], budget), dtype=torch.int32)
