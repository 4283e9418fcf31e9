"""Summary keys: the mean key and value of every window, and how many of its tokens each list lacks."""

import torch
from torch import Tensor

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.layout import Layout, Side
from sparsifiner.ops.precision import accumulation_dtype


def window_means(x: Tensor, layout: Layout, side: Side) -> Tensor:
    """[B, H, N, d] to the means of the windows [B, H, W, d], accumulated in fp32."""
    return layout.square_means(x[:, :, layout.prefix :].to(accumulation_dtype(x.dtype)), side).to(x.dtype)


def unselected_per_window(connectivity: Connectivity, side: Side) -> Tensor:
    """Tokens of each window that each list lacks, int64 [B, H, rows, W]."""
    layout, windows = connectivity.layout, connectivity.layout.squares(side)
    tokens = torch.where(connectivity.is_key(), connectivity.indices, -1)
    if not connectivity.ascends():  # a token that is named twice is lacked no less than once
        tokens = tokens.sort(-1).values
        tokens[..., 1:].masked_fill_(tokens[..., 1:] == tokens[..., :-1].clone(), -1)
    window = layout.square_of_token(tokens, side).long()
    selected = torch.zeros(*tokens.shape[:-1], windows + 1, dtype=torch.int64, device=tokens.device)
    selected = selected.scatter_add(-1, window, torch.ones_like(window))
    return layout.square_sizes(side, tokens.device) - selected[..., :windows]
