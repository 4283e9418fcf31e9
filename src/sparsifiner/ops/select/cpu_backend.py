"""Selection by the native library: one call of its C functions."""

import ctypes

import torch
from torch import Tensor

from sparsifiner.ops import native


def select_topk(scores: Tensor, budget: int, forced: int, own: Tensor) -> Tensor:
    """As the reference, with the rules for special scores, forced and own tokens in the same pass.

    Args:
        scores: [B, H, rows, N], any floating dtype.
        budget: list length k.
        forced: the first keys, in every list.
        own: integer [rows, m], what a row without any score selects, ascending, -1 last.

    Returns:
        int32 [B, H, rows, k], ascending, -1 last.
    """
    scores = scores.float().contiguous()
    indices, lists, own = _lists(scores.shape, scores.shape[-1], budget, forced, own)
    library, isa = native.ready()
    library.sparsifiner_select_topk(isa, torch.get_num_threads(), ctypes.byref(lists), scores.data_ptr())
    return indices


def select_lowrank(
    coefficients: Tensor, basis: Tensor, kept: int, budget: int, forced: int, own: Tensor
) -> Tensor:
    """Lists of the scores C̃ Ũᵀ, which never reach memory.

    Args:
        coefficients: C, fp32 [B, H, rows, K].
        basis: Ũᵀ, fp32 [K, N].
        kept: coefficients of a row that count, the largest.
        budget: list length k.
        forced: the first keys, in every list.
        own: integer [rows, m], as for `select_topk`.

    Returns:
        int32 [B, H, rows, k], ascending, -1 last.
    """
    if not 1 <= kept <= basis.shape[0] == coefficients.shape[-1]:
        raise ValueError(
            f"select_lowrank: {kept} of {coefficients.shape[-1]} coefficients do not go with a basis of "
            f"{basis.shape[0]} rows; give 1 up to as many as there are"
        )
    coefficients, basis = coefficients.float().contiguous(), basis.float().contiguous()
    indices, lists, own = _lists(coefficients.shape, basis.shape[1], budget, forced, own)
    library, isa = native.ready()
    library.sparsifiner_select_lowrank(
        *(isa, torch.get_num_threads(), ctypes.byref(lists)),
        *(coefficients.data_ptr(), basis.data_ptr(), basis.shape[0], kept),
    )
    return indices


def _lists(
    shape: torch.Size, tokens: int, budget: int, forced: int, own: Tensor
) -> tuple[Tensor, native.Lists, Tensor]:
    """Empty lists for rows [B, H, rows], as torch and as C know them, and `own` as C reads it."""
    B, H, rows = shape[:3]
    indices = torch.empty(B, H, rows, budget, dtype=torch.int32, device="cpu")
    own = own.int().contiguous()
    sizes = (B * H * rows, rows, tokens, budget, forced, own.shape[1])
    return indices, native.Lists(*sizes, own.data_ptr(), indices.data_ptr()), own
