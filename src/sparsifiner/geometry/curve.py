"""Tokens that are left of an image: prefix tokens first, then its surviving patches along a curve.

The curve is of Z-order, which keeps neighbours together: a run of it takes the place of a square.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsifiner.geometry.layout import Layout, Run, Side


@dataclass(frozen=True)
class CurveLayout(Layout):
    """The token sequence of an image of which some patches are gone.

    What a square of `side` x `side` patches is on a grid, here is a run of as many survivors, whatever lay
    between them; the last run may be shorter.

    Attributes:
        survivors: number of patch tokens.
        prefix: number of tokens before them, prefix and fused ones.
    """

    survivors: int
    prefix: int = 0

    @property
    def raster(self) -> tuple[int, int]:
        """See `Layout.raster`: the curve is one row, of which runs are cut."""
        return 1, self.survivors

    def extent(self, side: Side) -> int:
        """See `Layout.extent`: length of the run."""
        return side.length if isinstance(side, Run) else side * side

    def auto_summary(self) -> Run:
        """See `Layout.auto_summary`: a run of a length that no square need have."""
        return Run(self._auto_extent())

    def whole(self) -> Run:
        """See `Layout.whole`: the run of all survivors."""
        return Run(self.survivors)

    def coarsened(self, side: int) -> "CurveLayout":
        """See `Layout.coarsened`."""
        return CurveLayout(self.squares(side))

    def __str__(self) -> str:
        """In words."""
        return f"curve of {self.survivors} patches"


def places_on_curve(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Patch at each place of the curve, int64 [places], and whether the grid has it.

    Bits of column and row take turns in a place. The curve runs through the grid with sides rounded up to
    powers of two. Every square whose side is a power of two, aligned to it, is a run of the curve.
    """
    height_bits, width_bits = ((side - 1).bit_length() for side in grid)
    rest = torch.arange(1 << (height_bits + width_bits), device=device)
    row, column = torch.zeros_like(rest), torch.zeros_like(rest)
    for bit in range(max(height_bits, width_bits)):
        if bit < width_bits:
            column |= (rest & 1) << bit
            rest = rest >> 1
        if bit < height_bits:
            row |= (rest & 1) << bit
            rest = rest >> 1
    exists = (row < grid[0]) & (column < grid[1])
    return torch.where(exists, row * grid[1] + column, 0), exists
