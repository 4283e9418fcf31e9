"""Per-query lists as a mask for fused dense attention: on a GPU faster than gathers while N is small."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.layout import Side
from sparsifiner.ops.precision import accumulation_dtype
from sparsifiner.ops.sparse_attention.summaries import unselected_per_window, window_means

# Fused kernels read a bias whose rows begin at multiples of this many elements without a copy.
_ALIGNMENT = 8


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, connectivity: Connectivity, summary: Side | None, scale: float
) -> Tensor:
    """Same function as the reference, for tile 1; keeps a bias [B, H, N, N + W] in the dtype of `q`.

    Args:
        q: [B, H, N, d], as are `k` and `v`.
        k: keys.
        v: values.
        connectivity: the key lists, one per query, without repeated keys.
        summary: side of the windows in patches, or the run that one is; None for no summaries.
        scale: factor of the logits.

    Returns:
        [B, H, N, d] in the dtype of `q`.
    """
    assert connectivity.tile == 1
    assert connectivity.ascends()  # a mask cannot count keys that are named twice
    layout, indices, prefix = connectivity.layout, connectivity.indices, connectivity.prefix
    N = layout.tokens
    # torch's kernel for masks reads beyond heads that share their memory (pytorch issue 191937)
    q, k, v = (x.contiguous() if 0 in x.stride() else x for x in (q, k, v))
    key, value, windows = k, v, 0
    if summary is not None:
        key = torch.cat([k, window_means(k, layout, summary)], 2)  # [B, H, N + W, d]
        value = torch.cat([v, window_means(v, layout, summary)], 2)
        windows = layout.squares(summary)
    # one column beyond the keys takes the empty slots
    width = -(-(N + windows + 1) // _ALIGNMENT) * _ALIGNMENT
    bias = torch.full((*q.shape[:3], width), -torch.inf, dtype=q.dtype, device=q.device)
    slots = torch.where(connectivity.is_key(), indices, width - 1).long()
    bias[:, :, prefix:].scatter_(-1, slots, 0.0)
    bias[:, :, :prefix, :N] = 0.0
    if summary is not None:
        unselected = unselected_per_window(connectivity, summary).to(accumulation_dtype(q.dtype))
        bias[:, :, prefix:, N : N + windows] = unselected.log().to(q.dtype)
    if summary is not None:
        return F.scaled_dot_product_attention(q, key, value, attn_mask=bias[..., : N + windows], scale=scale)
    # a query without any key attends to key 0, and its result counts nothing
    keyless = ~connectivity.is_key()[..., :1]
    bias[:, :, prefix:, :1].masked_fill_(keyless, 0.0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[..., :N], scale=scale)
    return out.masked_fill(F.pad(keyless, (0, 0, prefix, 0)), 0.0)
