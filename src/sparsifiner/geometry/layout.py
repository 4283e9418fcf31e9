"""What every layout of tokens answers: how its patches are cut into squares, for tiles and for windows.

Tiles (squares of queries that share one key list) and windows (squares of keys that share one
summary) are cut in the same way, so both are *squares* here. What a square of `side` x `side` patches is,
a layout says: on a grid the square itself, on a curve a run of as many patches. `tile`, `pool` and `summary`
are such sides.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifiner import tuned


@dataclass(frozen=True)
class Run:
    """A run of patches along a curve, told by its length where no square need have as many.

    Attributes:
        length: in patches, at least 1.

    Raises:
        ValueError: it is less.
    """

    length: int

    def __post_init__(self) -> None:
        """Rejects runs of no patches."""
        if self.length < 1:
            raise ValueError(f"a run has a length of at least 1 patch, got {self.length}")


# what squares a layout is cut into: by their side in patches, on a curve also by a run that is told
Side = int | Run


class Layout(ABC):
    """The token sequence of one call: prefix tokens first, then patches.

    Squares are cut from rows and columns of patches: from the top left corner, in row-major order, with
    smaller squares at the right and bottom edges where they do not divide the rows or columns.

    Attributes:
        prefix: number of prefix tokens (cls, dist, registers, fused) before the patches.
    """

    prefix: int

    @property
    @abstractmethod
    def raster(self) -> tuple[int, int]:
        """Rows and columns in which the patches lie; kernels know a layout by these."""

    @abstractmethod
    def extent(self, side: Side) -> int:
        """Rows and columns, as far as there are any, that a square takes of the raster; as kernels take it.

        Raises:
            TypeError: a run is told of a grid.
        """

    @abstractmethod
    def auto_summary(self) -> Side:
        """Largest windows of which there are still 48; at least 2 long, since one patch needs no summary."""

    @abstractmethod
    def whole(self) -> Side:
        """The square that holds all patches."""

    @abstractmethod
    def coarsened(self, side: int) -> "Layout":
        """Where the squares lie, taken for patches, without a prefix."""

    def for_kernels(self, *sides: Side | None) -> tuple[int, ...]:
        """The layout as kernels take it: rows, columns, prefix and the extents of squares, 0 for None."""
        extents = (0 if side is None else self.extent(side) for side in sides)
        return *self.raster, self.prefix, *extents

    @property
    def patches(self) -> int:
        """Number of patch tokens."""
        rows, columns = self.raster
        return rows * columns

    @property
    def tokens(self) -> int:
        """Number of all tokens N, prefix included."""
        return self.prefix + self.patches

    def square_grid(self, side: Side) -> tuple[int, int]:
        """Squares along the rows and columns of the raster."""
        return self._cut(self.extent(side))

    def square_shape(self, side: Side) -> tuple[int, int]:
        """Rows and columns of a whole square: no more than the raster has."""
        extent, (rows, columns) = self.extent(side), self.raster
        return min(extent, rows), min(extent, columns)

    def square_patches(self, side: Side) -> int:
        """Patches of a whole square."""
        height, width = self.square_shape(side)
        return height * width

    def squares(self, side: Side) -> int:
        """Number of squares."""
        rows, columns = self._cut(self.extent(side))
        return rows * columns

    def positions(self, device: torch.device) -> Tensor:
        """Row and column of each patch in the raster, int64 [patches, 2]."""
        patch = torch.arange(self.patches, device=device)
        return torch.stack([patch // self.raster[1], patch % self.raster[1]], -1)

    def square_of_token(self, token: Tensor, side: Side) -> Tensor:
        """Square that each token lies in; prefix tokens and empty slots (-1) give `squares(side)`.

        Args:
            token: token indices of any shape, integer dtype.
            side: side of a square in patches.
        """
        patch, extent, width = token - self.prefix, self.extent(side), self.raster[1]
        rows, columns = self._cut(extent)
        square = (patch // width // extent) * columns + patch % width // extent
        return torch.where(patch >= 0, square, rows * columns)

    def square_sizes(self, side: Side, device: torch.device) -> Tensor:
        """Number of patches in each square, int64 [squares]; squares at the edges have fewer."""
        edges, extent = [], self.extent(side)
        for length, count in zip(self.raster, self._cut(extent), strict=True):
            start = torch.arange(count, device=device) * extent
            # where, not clamp: Inductor of torch 2.11 takes clamp for index arithmetic that it cannot compare
            edges.append(torch.where(start + extent > length, length - start, extent))
        return (edges[0][:, None] * edges[1][None, :]).flatten()

    def split_squares(self, patches: Tensor, side: Side) -> Tensor:
        """Orders patch rows square by square, padding squares at the edges with zeros.

        Args:
            patches: [B, H, patches, d] in raster order, without prefix tokens.
            side: side of a square in patches.

        Returns:
            [B, H, squares, m, d] with m the patches of a whole square.
        """
        B, H, _, d = patches.shape
        extent, (length, breadth) = self.extent(side), self.raster
        if extent == 1:
            return patches.unsqueeze(3)
        rows, columns = self._cut(extent)
        height, width = min(extent, length), min(extent, breadth)
        padded = patches.reshape(B, H, length, breadth, d)
        pad_h, pad_w = rows * height - length, columns * width - breadth
        if pad_h or pad_w:
            padded = F.pad(padded, (0, 0, 0, pad_w, 0, pad_h))
        split = padded.reshape(B, H, rows, height, columns, width, d).transpose(3, 4)
        return split.reshape(B, H, rows * columns, height * width, d)

    def merge_squares(self, squares: Tensor, side: Side) -> Tensor:
        """Inverse of `split_squares`: [B, H, squares, m, d] to raster [B, H, patches, d]."""
        B, H, _, _, d = squares.shape
        extent, (length, breadth) = self.extent(side), self.raster
        if extent == 1:
            return squares.squeeze(3)
        rows, columns = self._cut(extent)
        height, width = min(extent, length), min(extent, breadth)
        merged = squares.reshape(B, H, rows, columns, height, width, d).transpose(3, 4)
        merged = merged.reshape(B, H, rows * height, columns * width, d)
        return merged[:, :, :length, :breadth].reshape(B, H, length * breadth, d)

    def square_means(self, patches: Tensor, side: Side) -> Tensor:
        """Mean of each square over the patches that are there: [B, H, patches, d] to [B, H, squares, d]."""
        if self.extent(side) == 1:
            return patches
        B, H, _, d = patches.shape
        # channels last in memory, which pooling reads in place
        image = patches.reshape(B * H, *self.raster, d).contiguous().permute(0, 3, 1, 2)
        shape = self.square_shape(side)
        means = F.avg_pool2d(image, shape, ceil_mode=True, count_include_pad=False)
        return means.permute(0, 2, 3, 1).reshape(B, H, self.squares(side), d)

    def squares_of_tiles(self, tile: int, pool: int, device: torch.device) -> Tensor:
        """Squares of side `pool` that make up each tile, a multiple of it: int64 [tiles, m].

        Tiles at the edges have fewer, and name their first one again instead.
        """
        squares = self.coarsened(pool).square_tokens(tile // pool, device)
        return torch.where(squares < 0, squares[:, :1], squares)

    def squares_per_tile(self, tile: int, pool: int) -> int:
        """How many squares of side `pool` make up a whole tile: m of `squares_of_tiles`."""
        return self.coarsened(pool).square_patches(tile // pool)

    def square_tokens(self, side: Side, device: torch.device) -> Tensor:
        """Tokens of each square in ascending order, int64 [squares, m], -1 last at the edges."""
        token = torch.arange(self.prefix, self.tokens, device=device)
        if self.extent(side) == 1:
            return token.unsqueeze(1)
        # padding is zero, so shift by one to tell it from token 0
        split = self.split_squares((token + 1).view(1, 1, -1, 1), side)[0, 0, :, :, 0]
        ascending = torch.where(split > 0, split - 1, self.tokens).sort(-1).values
        return torch.where(ascending < self.tokens, ascending, -1)

    def _cut(self, extent: int) -> tuple[int, int]:
        rows, columns = self.raster
        return -(-rows // extent), -(-columns // extent)

    def _auto_extent(self) -> int:
        """Extent of the windows that `auto_summary` chooses."""
        extent = 2
        rows, columns = self._cut(extent + 1)
        while rows * columns >= tuned.AUTO_SUMMARY_WINDOWS:
            extent += 1
            rows, columns = self._cut(extent + 1)
        return extent
