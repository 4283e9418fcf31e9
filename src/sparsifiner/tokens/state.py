"""Which tokens a block sees, once some have been dropped or merged."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsifiner import tuned
from sparsifiner.geometry.curve import CurveLayout, places_on_curve
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.geometry.layout import Layout
from sparsifiner.ops import select_topk


@dataclass(frozen=True)
class TokenState:
    """The tokens of one call on their way through the blocks: prefix, fused tokens, patches.

    Until the first one is dropped patches lie in raster order. From then on they lie along a curve, see
    `CurveLayout`.

    Attributes:
        whole: where all tokens of the image lie.
        fused: fused tokens behind the prefix; they count as prefix.
        positions: int64 [B, n], raster index of each patch token among all patches; None while all are there.
        sizes: [B, N], patches that each token stands for; None while each stands for itself.
        policy: [B, N] of 0 and 1 with gradient, tokens that would be there; None where dropped ones are gone.
        backend: of the selection, see `sparsifiner.ops.select_topk`.
    """

    whole: TokenLayout
    fused: int = 0
    positions: Tensor | None = None
    sizes: Tensor | None = None
    policy: Tensor | None = None
    backend: str = "auto"

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.whole.prefix + self.fused

    @property
    def layout(self) -> Layout:
        """Where the tokens that are left lie."""
        if self.positions is None:
            return self.whole
        return CurveLayout(self.positions.shape[1], self.prefix)

    @property
    def is_plain(self) -> bool:
        """Whether all tokens of the image are there, each for itself."""
        return self.positions is None and self.sizes is None and self.policy is None and not self.fused

    def tokens_of_image(self, batch: int, device: torch.device) -> Tensor:
        """Index of each token among all tokens of the image, int64 [B, N]; fused ones count as the first."""
        prefix = torch.arange(self.whole.prefix, device=device)
        before = torch.cat([prefix, prefix.new_zeros(self.fused)]).expand(batch, -1)
        return torch.cat([before, self.patch_positions(batch, device) + self.whole.prefix], 1)

    def patch_positions(self, batch: int, device: torch.device) -> Tensor:
        """`positions`, also while all patches are there: int64 [B, n]."""
        if self.positions is not None:
            return self.positions
        return torch.arange(self.whole.patches, device=device).expand(batch, -1)

    def best_patches(self, scores: Tensor, count: int) -> Tensor:
        """The patch tokens with the largest scores, of ties those that come first on the curve.

        Args:
            scores: [B, n] of the patch tokens of now; NaN come last.
            count: how many are wanted, 1 <= count <= n.

        Returns:
            int64 [B, count] indices among the patch tokens of now, along the curve.
        """
        if self.positions is not None:  # the patches of now follow the curve already
            return best_of(scores, count, self.backend)
        patch, exists = places_on_curve(self.whole.grid, scores.device)
        return patch[best_of(scores[:, patch], count, self.backend, exists)]

    def keep(self, chosen: Tensor, *, fused: int = 0, sizes: Tensor | None = None) -> "TokenState":
        """The state with these patch tokens alone.

        Args:
            chosen: [B, m] indices among the patch tokens of now, along the curve.
            fused: fused tokens from now on.
            sizes: [B, N] of all tokens from now on, None while each stands for itself.
        """
        positions = self.patch_positions(chosen.shape[0], chosen.device).gather(1, chosen)
        return replace(self, positions=positions, fused=fused, sizes=sizes)


def best_of(scores: Tensor, count: int, backend: str, exists: Tensor | None = None) -> Tensor:
    """Indices of the largest scores of each image, of ties the first: int64 [B, count], ascending.

    Args:
        scores: [B, n], compared in fp32; NaN come last.
        count: how many are wanted.
        backend: see `sparsifiner.ops.select_topk`.
        exists: bool [n], which of them are there, at least `count`; None for all.
    """
    # the selection leaves out what is -inf
    lowest = torch.finfo(torch.float32).min
    scores = scores.detach().float().nan_to_num(nan=lowest, neginf=lowest)
    if exists is not None:
        scores = scores.masked_fill(~exists, -torch.inf)
    if not scores.is_cuda and scores.shape[1] <= tuned.SORTED_SCORES:
        return scores.argsort(dim=1, descending=True, stable=True)[:, :count].sort(dim=1).values
    return select_topk(scores[:, None, None], count, backend=backend)[:, 0, 0].long()


def take_tokens(x: Tensor, chosen: Tensor) -> Tensor:
    """Rows [B, m, C] of x [B, n, C] by indices [B, m]."""
    return x.gather(1, chosen[:, :, None].expand(-1, -1, x.shape[-1]))
