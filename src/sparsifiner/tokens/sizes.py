"""Proportional attention: a token that stands for many weighs as many in the softmax."""

import torch
from torch import Tensor

from sparsifiner import tuned
from sparsifiner.ops.precision import accumulation_dtype

# Head dims that every kernel takes.
_STEP = 16


def prefers_bias(q: Tensor) -> bool:
    """Whether dense attention of q [B, H, N, d] had better take sizes as a bias than as more channels."""
    return not q.is_cuda or q.shape[2] <= tuned.BIASED_TOKENS


def log_sizes(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to the logits of tokens that stand for several: log of sizes [B, N], in another dtype."""
    return sizes.to(accumulation_dtype(dtype)).log().to(dtype)


def weigh_by_size(
    q: Tensor, k: Tensor, v: Tensor, sizes: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes the logs of the sizes into more channels of q and k, so that attention to lists adds them up.

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
    d = q.shape[-1]
    # written where it belongs: padding fills all of a tensor before it copies
    wide = q.new_empty(3, *q.shape[:3], d + _STEP - d % _STEP)
    for index, x in enumerate((q, k, v)):
        wide[index, ..., :d] = x
        wide[index, ..., d:] = 0.0
    wide[0, ..., -1] = 1 / scale
    wide[1, ..., -1] = log_sizes(sizes, k.dtype)[:, None]
    return wide[0], wide[1], wide[2]
