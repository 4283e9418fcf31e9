"""Tokens of a whole image: prefix tokens first, then the patches of a grid in raster order."""

from collections.abc import Sequence
from dataclasses import dataclass

from sparsifiner.geometry.layout import Layout, Run, Side
from sparsifiner.hashed import hashed_once


@hashed_once
@dataclass(frozen=True)
class TokenLayout(Layout):
    """The token sequence of one image size.

    Attributes:
        grid: patches along height and width.
        prefix: number of prefix tokens (cls, dist, registers) before the patches.
    """

    grid: tuple[int, int]
    prefix: int = 0

    @property
    def raster(self) -> tuple[int, int]:
        """See `Layout.raster`: the grid."""
        return self.grid

    def extent(self, side: Side) -> int:
        """See `Layout.extent`: the side."""
        if type(side) is not int and isinstance(side, Run):
            raise TypeError(f"a grid is cut into squares, got {side}; give their side in patches")
        return side

    def auto_summary(self) -> int:
        """See `Layout.auto_summary`: a side in patches."""
        return self._auto_extent()

    def whole(self) -> int:
        """See `Layout.whole`: the longer side of the grid."""
        return max(self.grid)

    def coarsened(self, side: int) -> "TokenLayout":
        """See `Layout.coarsened`."""
        return TokenLayout(self.square_grid(side))

    def __str__(self) -> str:
        """In words."""
        return f"{self.grid[0]}x{self.grid[1]} grid"


def layout_of(geometry: Sequence[int]) -> TokenLayout:
    """The layout that kernels get: rows, columns and prefix, as `Layout.for_kernels` tells them."""
    rows, columns, prefix = geometry[:3]
    return TokenLayout((rows, columns), prefix)
