"""Where tokens lie: prefix tokens first, then the patches of a grid in raster order.

Tiles (squares of queries that share one key list) and windows (squares of keys that share one
summary) are cut in the same way, so both are *squares* here: from the top left corner, in
row-major order, with smaller squares at the right and bottom edges where the side does not divide
the grid.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

AUTO_SUMMARY_WINDOWS = 48


@dataclass(frozen=True)
class TokenLayout:
    """The token sequence of one image size.

    Attributes:
        grid: patches along height and width.
        prefix: number of prefix tokens (cls, dist, registers) before the patches.
    """

    grid: tuple[int, int]
    prefix: int = 0

    @property
    def patches(self) -> int:
        """Number of patch tokens."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Number of all tokens N, prefix included."""
        return self.prefix + self.patches

    def square_grid(self, side: int) -> tuple[int, int]:
        """Squares of `side` x `side` patches along height and width."""
        return -(-self.grid[0] // side), -(-self.grid[1] // side)

    def square_shape(self, side: int) -> tuple[int, int]:
        """Patches of a whole square along height and width: no more than the grid has."""
        return min(side, self.grid[0]), min(side, self.grid[1])

    def squares(self, side: int) -> int:
        """Number of squares."""
        rows, columns = self.square_grid(side)
        return rows * columns

    def auto_summary(self) -> int:
        """Largest window side that still gives 48 windows; at least 2, since one patch needs no summary."""
        side = 2
        while self.squares(side + 1) >= AUTO_SUMMARY_WINDOWS:
            side += 1
        return side

    def square_of_token(self, token: Tensor, side: int) -> Tensor:
        """Square that each token lies in; prefix tokens and empty slots (-1) give `squares(side)`.

        Args:
            token: raster token indices of any shape, integer dtype.
            side: side of a square in patches.
        """
        patch = token - self.prefix
        columns = self.square_grid(side)[1]
        square = (patch // self.grid[1] // side) * columns + patch % self.grid[1] // side
        return torch.where(patch >= 0, square, self.squares(side))

    def square_sizes(self, side: int, device: torch.device) -> Tensor:
        """Number of patches in each square, int64 [squares]; squares at the edges have fewer."""
        edges = []
        for length, count in zip(self.grid, self.square_grid(side), strict=True):
            start = torch.arange(count, device=device) * side
            # where, not clamp: Inductor of torch 2.11 takes clamp for index arithmetic that it cannot compare
            edges.append(torch.where(start + side > length, length - start, side))
        return (edges[0][:, None] * edges[1][None, :]).flatten()

    def split_squares(self, patches: Tensor, side: int) -> Tensor:
        """Orders patch rows square by square, padding squares at the edges with zeros.

        Args:
            patches: [B, H, gh * gw, d] in raster order, without prefix tokens.
            side: side of a square in patches.

        Returns:
            [B, H, squares, m, d] with m the patches of a whole square.
        """
        B, H, _, d = patches.shape
        if side == 1:
            return patches.unsqueeze(3)
        rows, columns = self.square_grid(side)
        height, width = self.square_shape(side)
        padded = patches.reshape(B, H, *self.grid, d)
        pad_h, pad_w = rows * height - self.grid[0], columns * width - self.grid[1]
        if pad_h or pad_w:
            padded = F.pad(padded, (0, 0, 0, pad_w, 0, pad_h))
        split = padded.reshape(B, H, rows, height, columns, width, d).transpose(3, 4)
        return split.reshape(B, H, rows * columns, height * width, d)

    def merge_squares(self, squares: Tensor, side: int) -> Tensor:
        """Inverse of `split_squares`: [B, H, squares, m, d] to raster [B, H, gh * gw, d]."""
        B, H, _, _, d = squares.shape
        if side == 1:
            return squares.squeeze(3)
        rows, columns = self.square_grid(side)
        height, width = self.square_shape(side)
        merged = squares.reshape(B, H, rows, columns, height, width, d).transpose(3, 4)
        merged = merged.reshape(B, H, rows * height, columns * width, d)
        return merged[:, :, : self.grid[0], : self.grid[1]].reshape(B, H, self.patches, d)

    def square_means(self, patches: Tensor, side: int) -> Tensor:
        """Mean of each square over the patches that are there: [B, H, gh * gw, d] to [B, H, squares, d]."""
        if side == 1:
            return patches
        B, H, _, d = patches.shape
        # channels last in memory, which pooling reads in place
        image = patches.reshape(B * H, *self.grid, d).contiguous().permute(0, 3, 1, 2)
        shape = self.square_shape(side)
        means = F.avg_pool2d(image, shape, ceil_mode=True, count_include_pad=False)
        return means.permute(0, 2, 3, 1).reshape(B, H, self.squares(side), d)

    def squares_of_tiles(self, tile: int, pool: int, device: torch.device) -> Tensor:
        """Squares of side `pool` that make up each tile, a multiple of it: int64 [tiles, m].

        Tiles at the edges have fewer, and name their first one again instead.
        """
        squares = TokenLayout(self.square_grid(pool)).square_tokens(tile // pool, device)
        return torch.where(squares < 0, squares[:, :1], squares)

    def square_tokens(self, side: int, device: torch.device) -> Tensor:
        """Tokens of each square in ascending order, int64 [squares, m], -1 last at the edges."""
        token = torch.arange(self.prefix, self.tokens, device=device)
        if side == 1:
            return token.unsqueeze(1)
        # padding is zero, so shift by one to tell it from token 0
        split = self.split_squares((token + 1).view(1, 1, -1, 1), side)[0, 0, :, :, 0]
        ascending = torch.where(split > 0, split - 1, self.tokens).sort(-1).values
        return torch.where(ascending < self.tokens, ascending, -1)
