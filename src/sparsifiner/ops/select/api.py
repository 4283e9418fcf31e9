"""Public entry of the selection: checks, the rules for special scores, the choice of a backend."""

import torch
from torch import Tensor

from sparsifiner.ops.backends import resolve_backend
from sparsifiner.ops.select import operators, reference, torch_backend


def select_topk(
    scores: Tensor,
    budget: int,
    *,
    forced: int = 0,
    own: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Selects the `budget` best keys of every row, exactly.

    Scores are compared in fp32, larger first, ties to the lowest key index. NaN counts as -inf, and
    -inf is never selected: its slot stays empty. A row without any score above -inf selects its own
    tokens. The result carries no gradient.

    Args:
        scores: [B, H, rows, N], any floating dtype.
        budget: list length k, 1 <= k <= N.
        forced: the first `forced` keys (the prefix) are in every list, inside the budget, whatever
            their scores.
        own: integer [rows, m], the tokens that each row stands for, ascending, -1 (none) last, none of
            them a forced one; by default row r stands for the one token `N - rows + r`, as with one list
            per patch query, or for none where that token is forced.
        backend: "auto", "reference", "torch", "cpu" (native code) or, on a GPU, "triton".

    Returns:
        int32 [B, H, rows, budget], ascending, -1 (empty) last.

    Raises:
        TypeError: `scores` are not floating point.
        ValueError: a shape, `budget`, `forced` or `backend` is impossible.
    """
    if not scores.is_floating_point():
        raise TypeError(f"select_topk: scores must be floating point, got {scores.dtype}")
    if scores.ndim != 4:
        raise ValueError(f"select_topk: scores must be [B, H, rows, N], got shape {tuple(scores.shape)}")
    rows, N = scores.shape[-2:]
    if not 1 <= budget <= N:
        raise ValueError(f"select_topk: budget must lie in 1..{N} (the number of keys), got {budget}")
    if not 0 <= forced <= budget:
        raise ValueError(f"select_topk: forced must lie in 0..{budget} (the budget), got {forced}")
    if own is None:
        tokens = (torch.arange(rows, device=scores.device) + (N - rows)).clamp(min=0)
        own = torch.where(tokens < forced, -1, tokens).unsqueeze(1)
    elif own.ndim != 2 or own.shape[0] != rows:
        raise ValueError(f"select_topk: own must be [rows={rows}, m], got shape {tuple(own.shape)}")

    chosen = resolve_backend(backend, "select_topk", scores.device)
    scores = scores.detach()
    if chosen in operators.select_topk.backends:
        listed: Tensor = operators.select_topk(scores, budget, forced, own, chosen)
        return listed
    scores = scores.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if forced:
        # among equal scores the lowest index wins, so +inf keeps the prefix even beside other +inf
        always = torch.full_like(scores[..., :forced], torch.inf)
        scores = torch.cat([always, scores[..., forced:]], -1)
    select = reference if chosen == "reference" else torch_backend
    return _fill_empty(select.select_topk(scores, budget), own, forced)


def _fill_empty(indices: Tensor, own: Tensor, forced: int) -> Tensor:
    """Gives rows that hold nothing but forced keys their own tokens."""
    budget = indices.shape[-1]
    if budget == forced:
        return indices
    empty = indices[..., forced : forced + 1] < 0
    free = budget - forced
    tokens = torch.full((own.shape[0], free), -1, dtype=torch.int32, device=indices.device)
    tokens[:, : own.shape[1]] = own[:, :free]
    filled = torch.cat([indices[..., :forced], tokens.expand(*indices.shape[:-1], -1)], -1)
    return torch.where(empty, filled, indices)
