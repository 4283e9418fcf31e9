"""Connectivity: for every row of queries, the keys that it attends to."""

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from sparsifiner.layout import TokenLayout


def exact_ratio(keep: float) -> tuple[int, int]:
    """The fraction that was meant by a float, as two integers: .1 is 1/10, not its binary neighbour.

    Integers also keep `torch.compile` from turning a changed `keep` into a symbolic float.
    """
    return Fraction(keep).limit_denominator(10**6).as_integer_ratio()


def key_budget(keep: tuple[int, int], tokens: int, forced: int) -> int:
    """Single keys in the list of one row: `min(N, max(ceil(keep * N), forced + 1))`.

    Args:
        keep: share of the N tokens that a row attends to, as an `exact_ratio`.
        tokens: N, prefix included.
        forced: prefix keys that are in every list, inside the budget; 0 where they compete.
    """
    numerator, denominator = keep
    return min(tokens, max(-(-numerator * tokens // denominator), forced + 1))


def forced_prefix(prefix: int, tile: int, summary: int | str | None) -> int:
    """Number of prefix keys forced into every list.

    They are forced where queries share a list or windows are summarised, since no window holds
    them; with one list per query and no summaries they compete, as in the paper.
    """
    return prefix if tile > 1 or summary is not None else 0


@dataclass(frozen=True)
class Connectivity:
    """Key lists of one layer and the geometry that they refer to.

    A row owns one list. Rows are patch queries: one per patch at tile 1, else one per tile of
    `tile` x `tile` patches in row-major order. Prefix queries have no row: they attend to every key.

    Attributes:
        indices: int32 [B, H, rows, k], raster token indices (prefix included), ascending,
            -1 for empty slots, which come last.
        grid: patches along height and width.
        tile: side of a tile in patches; 1 gives one list per query.
        prefix: number of prefix tokens before the patches.

    The entries themselves are not checked: indices outside 0..N-1 other than -1, or the same key twice in
    one list, are undefined behaviour.

    Raises:
        TypeError: `indices` are not int32.
        ValueError: the shape of `indices` does not fit the geometry.
    """

    indices: Tensor
    grid: tuple[int, int]
    tile: int = 1
    prefix: int = 0

    def __post_init__(self) -> None:
        """Checks shape and dtype; the entries are not read, which would wait for the device."""
        if self.indices.dtype != torch.int32:
            raise TypeError(
                f"Connectivity: indices must be int32, got {self.indices.dtype}; call indices.int()"
            )
        if self.indices.ndim != 4:
            raise ValueError(
                f"Connectivity: indices must be [B, H, rows, k], got shape {tuple(self.indices.shape)}"
            )
        if self.tile < 1 or self.prefix < 0:
            raise ValueError(
                f"Connectivity: tile must be at least 1 and prefix at least 0, "
                f"got tile={self.tile}, prefix={self.prefix}"
            )
        rows = self.layout.squares(self.tile)
        if self.indices.shape[2] != rows:
            raise ValueError(
                f"Connectivity: a {self.grid[0]}x{self.grid[1]} grid with tile={self.tile} has {rows} rows, "
                f"got indices with {self.indices.shape[2]}"
            )

    @property
    def layout(self) -> TokenLayout:
        """Geometry of the tokens."""
        return TokenLayout(self.grid, self.prefix)

    def alone(self) -> "Connectivity":
        """The lists for whoever has other keys and values than those that they were chosen from."""
        return self

    def to_mask(self) -> Tensor:
        """Dense mask, bool [B, H, N, N]: query i attends to key j; prefix rows are all true."""
        layout, N = self.layout, self.layout.tokens
        B, H, rows, _ = self.indices.shape
        device = self.indices.device
        slots = torch.where(self.indices >= 0, self.indices, N).long()
        listed = torch.zeros(B, H, rows, N + 1, dtype=torch.bool, device=device).scatter_(-1, slots, True)
        patches = torch.arange(self.prefix, N, device=device)
        row_of_patch = layout.square_of_token(patches, self.tile)
        mask = torch.ones(B, H, N, N, dtype=torch.bool, device=device)
        mask[:, :, self.prefix :] = listed[:, :, row_of_patch, :N]
        return mask

    def density(self) -> float:
        """Share of the N keys that a patch query attends to one by one, averaged over its rows."""
        sizes = self.layout.square_sizes(self.tile, self.indices.device)
        visits = (self.indices >= 0).sum(-1).double() * sizes
        rows_in_batch = self.indices.shape[0] * self.indices.shape[1]
        return float(visits.sum() / (rows_in_batch * self.layout.patches * self.layout.tokens))


@dataclass(frozen=True)
class ScoredLists(Connectivity):
    """Lists on their way from a scorer to attention over the very keys and values that it chose from.

    Attributes:
        window_means: [2, B, H, windows, d], means of these keys and values over the summary windows, which
            attention then need not compute again; None for no summaries.
    """

    window_means: Tensor | None = None

    def alone(self) -> Connectivity:
        """See `Connectivity.alone`."""
        return Connectivity(self.indices, self.grid, self.tile, self.prefix)
