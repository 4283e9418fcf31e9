"""Attention while a predictor learns: tokens that would be gone stay in the sequence, masked."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.layout import Side
from sparsifiner.ops.precision import accumulation_dtype, without_autocast

# how much more than the largest key that stays a key that goes may weigh, for its gradient alone
_LARGEST_WEIGHT = 1e6


def attend_with_policy(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    policy: Tensor,
    scale: float,
    connectivity: Connectivity | None = None,
    summary: Side | None = None,
) -> Tensor:
    """Dense attention in which keys weigh as much as the policy says, a token itself always; for training.

    The weight multiplies in the softmax, so that its gradient reaches tokens that were drawn to go. Windows
    are means over the tokens that stay. A query of whose keys none stays attends to itself.

    Args:
        q: [B, H, N, d] queries.
        k: [B, H, N, d] keys.
        v: [B, H, N, d] values.
        policy: [B, N] of 0 and 1.
        scale: factor of the logits.
        connectivity: key lists, None for all keys.
        summary: side of the summary windows, None for none.

    Returns:
        [B, H, N, d] in the dtype of q.

    Source:
        Rao et al., "DynamicViT", NeurIPS 2021, section 3.3.
    """
    N, dtype = q.shape[2], q.dtype
    q, k, v, policy = (x.to(accumulation_dtype(dtype)) for x in (q, k, v, policy))
    stays = policy[:, None, None]  # [B, 1, 1, N]
    itself = torch.eye(N, dtype=q.dtype, device=q.device)
    weight = stays + (1 - stays) * itself
    with without_autocast(q.device):
        logits = q @ k.mT * scale
        listed = None if connectivity is None else connectivity.to_mask()
        if listed is not None:
            weight = weight * listed
        if connectivity is not None and listed is not None and summary:
            layout = connectivity.layout
            square = layout.square_of_token(torch.arange(N, device=q.device), summary)
            member = F.one_hot(square, layout.squares(summary) + 1)[:, :-1].to(q.dtype)  # [N, W]
            share = policy[:, None, :, None] * member  # [B, 1, N, W]
            count = share.sum(2, keepdim=True).clamp(min=1e-6)
            mean_k, mean_v = (share.mT @ each / count.mT for each in (k, v))  # [B, H, W, d]
            missing = (~listed * stays) @ member  # [B, H, N, W]; none of prefix rows, which list every key
            logits = torch.cat([logits, q @ mean_k.mT * scale], -1)
            weight = torch.cat([weight.expand(*missing.shape[:3], -1), missing], -1)
            v = torch.cat([v, mean_v], 2)
        alone = (weight <= 0).all(-1, keepdim=True)
        weight = weight + alone * F.pad(itself, (0, weight.shape[-1] - N))
        largest = logits.detach().masked_fill(weight <= 0, -torch.inf).amax(-1, keepdim=True)
        exponential = (logits - largest).clamp(max=math.log(_LARGEST_WEIGHT)).exp() * weight
        out: Tensor = exponential @ v / exponential.sum(-1, keepdim=True)
    return out.to(dtype)
