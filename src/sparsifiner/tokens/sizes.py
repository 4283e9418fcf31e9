"""Proportional attention: a token that stands for many weighs as many in the softmax."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifiner.ops.precision import accumulation_dtype

# head dims that every kernel takes
_STEP = 16


def weigh_by_size(
    q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes the logs of the sizes into more channels of q and k, so that any attention adds them up.

    Args:
        q: [B, H, N, d] queries.
        k: [B, H, N, d] keys.
        v: [B, H, N, d] values.
        sizes: [B, N], patches that each token stands for.
        scale: factor of the logits.

    Returns:
        The three with the next multiple of 16 channels above d; values have zeros there.

    The mean key of a summary window then has the mean of the logs, so that a window weighs as the geometric
    mean of its sizes.

    Source:
        Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, equation 1.
    """
    more = _STEP - q.shape[-1] % _STEP
    q, v = F.pad(q, (0, more)), F.pad(v, (0, more))
    q[..., -1] = 1 / scale
    log_size = (
        sizes.to(accumulation_dtype(k.dtype))
        .log()
        .to(k.dtype)[:, None, :, None]
        .expand(-1, k.shape[1], -1, -1)
    )
    return q, torch.cat([F.pad(k, (0, more - 1)), log_size], -1), v
