"""Which tokens a block sees, once some have been dropped or merged."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsifiner.layout import TokenLayout


@dataclass(frozen=True)
class TokenState:
    """The tokens of one call on their way through the blocks: prefix, fused tokens, patches.

    Until the first one is dropped patches lie in raster order. From then on they lie along a curve that keeps
    neighbours together, so that a run of `tile ** 2` of them takes the place of a tile, and a run of
    `summary ** 2` that of a window.

    Attributes:
        whole: where all tokens of the image lie.
        fused: fused tokens behind the prefix; they count as prefix.
        positions: int64 [B, n], raster index of each patch token among all patches; None while all are there.
        sizes: [B, N], patches that each token stands for; None while each stands for itself.
        policy: [B, N] of 0 and 1 with gradient, tokens that would be there; None where dropped ones are gone.
    """

    whole: TokenLayout
    fused: int = 0
    positions: Tensor | None = None
    sizes: Tensor | None = None
    policy: Tensor | None = None

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self.whole.prefix + self.fused

    @property
    def layout(self) -> TokenLayout:
        """Where the tokens that are left lie."""
        if self.positions is None:
            return self.whole
        return TokenLayout((1, self.positions.shape[1]), self.prefix)

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

    def curve_order(self, chosen: Tensor) -> Tensor:
        """Permutation that puts patch tokens along the curve.

        Args:
            chosen: [B, m] indices among the patch tokens of now, without repetition.

        Returns:
            int64 [B, m]; `chosen.gather(1, order)` follows the curve.
        """
        if self.positions is not None:  # the patches of now follow it already
            return chosen.argsort(dim=1)
        return _place_on_curve(self.whole.grid, chosen.device)[chosen].argsort(dim=1)

    def keep(self, chosen: Tensor, *, fused: int = 0, sizes: Tensor | None = None) -> "TokenState":
        """The state with these patch tokens alone.

        Args:
            chosen: [B, m] indices among the patch tokens of now, along the curve.
            fused: fused tokens from now on.
            sizes: [B, N] of all tokens from now on, None while each stands for itself.
        """
        positions = self.patch_positions(len(chosen), chosen.device).gather(1, chosen)
        return replace(self, positions=positions, fused=fused, sizes=sizes)


def take_tokens(x: Tensor, chosen: Tensor) -> Tensor:
    """Rows [B, m, C] of x [B, n, C] by indices [B, m]."""
    return x.gather(1, chosen[:, :, None].expand(-1, -1, x.shape[-1]))


def _place_on_curve(grid: tuple[int, int], device: torch.device) -> Tensor:
    """Place of each raster position on a Z-order curve, int64 [patches]: bits of row and column in turn.

    Every square whose side is a power of two, aligned to it, is a run of the curve.
    """
    row = torch.arange(grid[0], device=device)[:, None]
    column = torch.arange(grid[1], device=device)[None, :]
    place = torch.zeros(grid, dtype=torch.long, device=device)
    for bit in range(max(grid).bit_length()):
        place = place | ((column >> bit & 1) << (2 * bit)) | ((row >> bit & 1) << (2 * bit + 1))
    return place.flatten()
