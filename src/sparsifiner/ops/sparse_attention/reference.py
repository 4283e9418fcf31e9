"""Specification of sparse attention: dense attention behind a mask."""

import torch
from torch import Tensor

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.layout import Side
from sparsifiner.ops.precision import accumulation_dtype


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, connectivity: Connectivity, summary: Side | None, scale: float
) -> Tensor:
    """Every query attends to its listed keys and to one summary key per window.

    ```
    c[i, j]    = how often the list of query i names key j   (1 for prefix queries)
    U[i, w]    = number of tokens j in window w with c[i, j] = 0
    K̄[w], V̄[w] = mean of k, v over all tokens of window w
    logits[i]  = [ q_i·k_j · scale + log c[i, j] ]  for every token j
               ++ [ q_i·K̄_w · scale + log U[i, w] ]  for every window w
    out[i]     = softmax(logits[i]) · [V ++ V̄]         (0 where every logit is -inf)
    ```

    Prefix queries have U = 0, so they see no summaries. Gradients flow through the means, not
    through the counts. fp32 throughout (fp64 for fp64 inputs), memory [B, H, N, N].

    Args:
        q: [B, H, N, d], as are `k` and `v`.
        k: keys.
        v: values.
        connectivity: the key lists.
        summary: side of the windows in patches, or the run that one is; None for no summaries.
        scale: factor of the logits.

    Returns:
        [B, H, N, d] in the dtype of `q`.
    """
    exact = accumulation_dtype(q.dtype)
    query, key, value = q.to(exact), k.to(exact), v.to(exact)
    counts = connectivity.to_counts()
    logits = query @ key.mT * scale + counts.clamp(min=1).to(exact).log()
    logits = logits.masked_fill(counts == 0, -torch.inf)
    if summary is not None:
        member = _window_membership(connectivity, summary).to(exact)  # [W, N]
        size = member.sum(1, keepdim=True)
        mean_key, mean_value = member @ key / size, member @ value / size
        unselected = (counts == 0).to(exact) @ member.mT  # [B, H, N, W]
        logits = torch.cat([logits, query @ mean_key.mT * scale + unselected.log()], -1)
        value = torch.cat([value, mean_value], 2)
    has_key = (logits > -torch.inf).any(-1, keepdim=True)
    probability = logits.masked_fill(~has_key, 0.0).softmax(-1) * has_key
    return (probability @ value).to(q.dtype)


def _window_membership(connectivity: Connectivity, side: Side) -> Tensor:
    """bool [windows, N]: token lies in window; prefix tokens lie in none."""
    layout = connectivity.layout
    (height, width), extent = layout.raster, layout.extent(side)
    member = torch.zeros(layout.squares(side), layout.tokens, dtype=torch.bool)
    window = 0
    for top in range(0, height, extent):
        for left in range(0, width, extent):
            for y in range(top, min(top + extent, height)):
                for x in range(left, min(left + extent, width)):
                    member[window, connectivity.prefix + y * width + x] = True
            window += 1
    return member.to(connectivity.indices.device)
