"""Merges the pairs of tokens that are most alike."""

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifiner.ops.precision import accumulation_dtype, without_autocast
from sparsifiner.tokens.method import Counts
from sparsifiner.tokens.reducer import TokenReducer
from sparsifiner.tokens.state import TokenState, best_of, take_tokens


class MergingReducer(TokenReducer):
    """Merges pairs of patches.

    Every second patch looks for the one most like it among the others; the most alike pairs are merged.

    Args:
        r: number of pairs.
    """

    def __init__(self, r: int) -> None:
        super().__init__()
        self.r = r

    def after_attention(
        self, x: Tensor, q: Tensor, k: Tensor, scale: float, state: TokenState
    ) -> tuple[Tensor, TokenState]:
        """See `TokenReducer.after_attention`."""
        B, N, _ = x.shape
        prefix, patches = state.prefix, state.layout.patches
        r = min(self.r, patches // 2)
        if not r:
            return x, state
        sizes = x.new_ones(B, N, dtype=torch.float32) if state.sizes is None else state.sizes
        # likeness is compared in fp32 or better, whatever autocast says
        with torch.no_grad(), without_autocast(k.device):
            key = F.normalize(
                k[:, :, prefix:].mean(1, dtype=accumulation_dtype(k.dtype)), dim=-1
            )  # [B, n, d]
            likeness = key[:, ::2] @ key[:, 1::2].mT
            best, partner = likeness.max(-1)  # of every second patch
            merged = best_of(best, r, state.backend)
            into = prefix + 2 * partner.gather(1, merged) + 1
            merged = prefix + 2 * merged
            stays = torch.ones_like(sizes).scatter_(1, merged, 0.0)[:, prefix:]
            left = state.best_patches(stays, patches - r)
            kept = torch.cat([torch.arange(prefix, device=x.device).expand(B, -1), prefix + left], 1)
        size = sizes.gather(1, merged)
        total = sizes.scatter_add(1, into, size)
        # shares of what they become a part of: sums of many large tokens would not fit into fp16
        share = (sizes.to(accumulation_dtype(x.dtype)) / total)[:, :, None]
        mean = x * share.to(x.dtype)
        of_merged = size.to(share.dtype) / total.gather(1, into)
        added = take_tokens(x, merged) * of_merged[:, :, None].to(x.dtype)
        mean.scatter_add_(1, into[:, :, None].expand_as(added), added)
        return take_tokens(mean, kept), state.keep(left, sizes=total.gather(1, kept))

    def macs(self, counts: Counts, prefix: int, width: int, head_dim: int) -> int:
        """See `TokenReducer.macs`: keys of half the patches times those of the other half."""
        patches = counts.attention - prefix
        return patches // 2 * (patches - patches // 2) * head_dim

    def extra_repr(self) -> str:
        """Number of pairs."""
        return f"r={self.r}"
