"""Attention to all keys, fused or in operations that can be differentiated twice."""

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None, *, fused: bool = True
) -> Tensor:
    """`softmax(q kᵀ · scale + bias) v`; a query whose every key has a bias of -inf gives zeros.

    Args:
        q: [B, H, n, d] queries.
        k: [B, H, m, d] keys.
        v: [B, H, m, d] values.
        scale: factor of the logits.
        bias: [B, H, n, m] or what broadcasts to it, in the dtype of `q`; None for none.
        fused: take torch's fused kernels, which have no second derivatives.

    Returns:
        [B, H, n, d] in the dtype of `q`.
    """
    if fused:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    logits = q * scale @ k.mT
    if bias is None:
        return logits.softmax(-1) @ v
    logits = logits + bias
    keyless = (logits == -torch.inf).all(-1, keepdim=True)
    return logits.masked_fill(keyless, 0.0).softmax(-1).masked_fill(keyless, 0.0) @ v
