"""Summary keys: the mean key and value of every window, and how many of its tokens each list lacks."""

import torch
from torch import Tensor

from sparsifiner.layout import TokenLayout
from sparsifiner.ops.precision import accumulation_dtype


def window_means(x: Tensor, layout: TokenLayout, side: int) -> Tensor:
    """[B, H, N, d] to the means of the windows [B, H, W, d], accumulated in fp32."""
    return layout.square_means(x[:, :, layout.prefix :].to(accumulation_dtype(x.dtype)), side).to(x.dtype)


def unselected_per_window(indices: Tensor, layout: TokenLayout, side: int) -> Tensor:
    """Tokens of each window that each list lacks: [B, H, rows, k] to int64 [B, H, rows, W]."""
    windows = layout.squares(side)
    window = layout.square_of_token(indices, side).long()
    selected = torch.zeros(*indices.shape[:-1], windows + 1, dtype=torch.int64, device=indices.device)
    selected = selected.scatter_add(-1, window, torch.ones_like(window))
    return layout.square_sizes(side, indices.device) - selected[..., :windows]
