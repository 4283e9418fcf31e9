"""EViT: keeps the patches that the class token attends to most."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsifiner.ops.precision import accumulation_dtype, without_autocast
from sparsifiner.tokens.method import (
    Counts,
    TokenMethod,
    TokenReducer,
    check_at,
    check_keep,
    share_of,
    stages_of,
)
from sparsifiner.tokens.state import TokenState, take_tokens


@dataclass(frozen=True)
class EViT(TokenMethod):
    """Drops patches between attention and MLP of some blocks, by the class token's attention.

    Attributes:
        keep: share of the patches that stay at each of these blocks, rounded up.
        fuse: put one token in the place of those that go: their sum, weighted by that attention. Heads that
            look at all patches, such as average pooling and LV-ViT's, see it as one of them.
        at: the blocks; a quarter, a half and three quarters of the depth by default.

    Source:
        Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
        Reorganizations", ICLR 2022.
    """

    keep: float = 0.7
    fuse: bool = True
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Rejects impossible shares."""
        check_keep(self.keep)
        object.__setattr__(self, "at", check_at(self.at))

    def reducer(self, layer: int, depth: int, width: int, patches: int) -> TokenReducer | None:
        """See `TokenMethod.reducer`."""
        drops = self.keep < 1 and layer in stages_of(self.at, depth)
        return AttentiveReducer(self.keep, self.fuse) if drops else None

    def counts(self, depth: int, patches: int, prefix: int) -> list[Counts]:
        """See `TokenMethod.counts`."""
        counts, fused = [], 0
        for layer in range(depth):
            before, left = fused, patches
            if layer in stages_of(self.at, depth):
                left = share_of(patches, self.keep)
                fused = int(self.fuse) if left < patches else fused
            seen = prefix + before + patches
            counts.append(Counts(seen, prefix + fused + left, before, patches - left))
            patches = left
        return counts

    def why_not(self, has_class_token: bool) -> str:
        """See `TokenMethod.why_not`."""
        return "" if has_class_token else "EViT needs a class token; use DynamicViT or ToMe"


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
