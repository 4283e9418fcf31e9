"""Our kernels as operators of torch, so that compilers, exporters and profilers see them."""

import torch
from torch import Tensor

from sparsifiner.ops.backend import HAS_TRITON

# Keys that the fused low-rank selection takes: a row of scores must fit in the registers of a program.
LOWRANK_TOKENS = 16_384

if HAS_TRITON:
    from sparsifiner.ops.select import triton_backend as triton_select


@torch.library.custom_op("sparsifiner::select_topk", mutates_args=())
def select_topk(scores: Tensor, budget: int, forced: int, own: Tensor) -> Tensor:
    """See `sparsifiner.ops.select_topk`; scores [B, H, rows, N], own [rows, m]."""
    return triton_select.select_topk(scores, budget, forced, own)


@select_topk.register_fake
def _(scores: Tensor, budget: int, forced: int, own: Tensor) -> Tensor:
    return scores.new_empty((*scores.shape[:-1], budget), dtype=torch.int32)


@torch.library.custom_op("sparsifiner::select_lowrank", mutates_args=())
def select_lowrank(
    coefficients: Tensor, basis: Tensor, coef_topk: int, budget: int, forced: int, own: Tensor
) -> Tensor:
    """Lists of the scores C̃ Ũᵀ; coefficients [B, H, rows, K], basis [K, N], own [rows, m]."""
    return triton_select.select_lowrank(coefficients, basis, coef_topk, budget, forced, own)


@select_lowrank.register_fake
def _(coefficients: Tensor, basis: Tensor, coef_topk: int, budget: int, forced: int, own: Tensor) -> Tensor:
    return coefficients.new_empty((*coefficients.shape[:-1], budget), dtype=torch.int32)
