"""Selection in torch operations: one top-k over keys that carry their own tie-break."""

import torch
from torch import Tensor

_INT32_MAX = 2**31 - 1


def select_topk(scores: Tensor, budget: int) -> Tensor:
    """As the reference, without sorting whole rows.

    `torch.topk` settles ties as it likes, so each score is joined with its position to one int64:
    the score's bits, in an order that integers share with floats, above `N - 1 - index`. No two are
    equal, the larger score wins, then the lower index.
    """
    N = scores.shape[-1]
    bits = (scores + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0: equal scores get equal bits
    ordered = torch.where(bits >= 0, bits, bits ^ _INT32_MAX).long()
    from_end = torch.arange(N - 1, -1, -1, device=scores.device)
    best = ((ordered << 32) | from_end).topk(budget, dim=-1, sorted=False).values
    lowest = torch.full((), -torch.inf, device=scores.device).view(torch.int32) ^ _INT32_MAX
    ascending = torch.where((best >> 32) > lowest, N - 1 - (best & _INT32_MAX), N).sort(-1).values
    return torch.where(ascending < N, ascending, -1).int()
