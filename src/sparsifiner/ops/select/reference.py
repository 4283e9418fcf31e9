"""Specification of the selection: a stable sort."""

import torch
from torch import Tensor


def select_topk(scores: Tensor, budget: int) -> Tensor:
    """For each row: sort by descending score, stably; take `budget` keys; drop -inf; sort by index.

    Args:
        scores: fp32 [B, H, rows, N] without NaN; -inf is never selected.
        budget: list length k.

    Returns:
        int32 [B, H, rows, k], ascending, -1 last.
    """
    N = scores.shape[-1]
    ranked = torch.sort(scores, dim=-1, descending=True, stable=True)
    best, score = ranked.indices[..., :budget], ranked.values[..., :budget]
    ascending = torch.where(score > -torch.inf, best, N).sort(-1).values
    return torch.where(ascending < N, ascending, -1).int()
