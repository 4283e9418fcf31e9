"""Drops the patches that the class token attends to least."""

import torch
from torch import Tensor

from sparsifiner.ops.precision import accumulation_dtype, without_autocast
from sparsifiner.tokens.method import Counts, share_of
from sparsifiner.tokens.reducer import TokenReducer
from sparsifiner.tokens.state import TokenState, take_tokens


class AttentiveReducer(TokenReducer):
    """Drops the patches that the class token attends to least.

    Args:
        keep: share of the patches that stay.
        fuse: put one token in the place of the others.
    """

    def __init__(self, keep: float, fuse: bool) -> None:
        super().__init__()
        self.keep = keep
        self.fuse = fuse

    def after_attention(
        self, x: Tensor, q: Tensor, k: Tensor, scale: float, state: TokenState
    ) -> tuple[Tensor, TokenState]:
        """See `TokenReducer.after_attention`."""
        patches = state.layout.patches
        left = share_of(patches, self.keep)
        if left == patches:
            return x, state
        attention = class_attention(q, k, scale)  # [B, N]
        chosen = state.best_patches(attention[:, state.prefix :], left)
        stays = chosen + state.prefix
        whole_prefix = state.whole.prefix
        first = [x[:, :whole_prefix]]
        if self.fuse:
            # a token that was fused before is fused again, so that there is one
            weight = attention.scatter(1, stays, 0.0)[:, None, whole_prefix:].to(x.dtype)
            first.append(weight @ x[:, whole_prefix:])
        return torch.cat([*first, take_tokens(x, stays)], 1), state.keep(chosen, fused=int(self.fuse))

    def macs(self, counts: Counts, prefix: int, width: int, head_dim: int) -> int:
        """See `TokenReducer.macs`: the class token's attention, and the tokens that go into the fused one."""
        into_fused = counts.gone + counts.fused if self.fuse else 0
        return (counts.attention + into_fused) * width

    def extra_repr(self) -> str:
        """Options."""
        return f"keep={self.keep}, fuse={self.fuse}"


def class_attention(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Attention of the first token to all tokens, the mean over heads: [B, N] of q, k [B, H, N, d].

    It is compared, so it is computed in fp32 or better, whatever autocast says.
    """
    accurate = accumulation_dtype(q.dtype)
    with without_autocast(q.device):
        # a product and a sum: a matmul would have a copy of the keys made
        logits = (q[:, :, :1].to(accurate) * k).sum(-1) * scale
    return logits.softmax(-1).mean(1)
