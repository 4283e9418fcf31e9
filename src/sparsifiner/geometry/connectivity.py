"""Connectivity: for every row of queries, the keys that it attends to."""

from dataclasses import InitVar, dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from sparsifiner.eager import can_be_read
from sparsifiner.geometry.curve import CurveLayout
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.geometry.layout import Layout


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
    `tile` x `tile` patches in row-major order, or, where patches are gone and the others lie along a curve,
    one per run of `tile` * `tile` survivors in its order. Prefix queries have no row: they attend to every
    key.

    Lists of this package ascend, -1 last. Those of others may come in any order: negative slots are empty
    wherever they are, and a key that is named twice counts twice.

    Attributes:
        indices: int32 [B, H, rows, k], token indices (prefix included), -1 for empty slots.
        grid: patches along height and width; None where they lie along a curve.
        tile: side of a tile in patches; 1 gives one list per query.
        prefix: number of prefix tokens before the patches.
        survivors: patches along a curve, None where there is a grid.
        selected: whether this package's own selection made the lists, which kernels then read as they are:
            tokens ascend, none is named twice, and empty slots come last.

    Args:
        check: look for tokens that are not there, which waits for the device. Without it, and while
            compiling, tracing or capturing, they are empty slots.

    Raises:
        TypeError: `indices` are not int32, or there is not one of grid and survivors.
        ValueError: the shape of `indices` does not fit the geometry, or they name a token that is not there.
    """

    indices: Tensor
    grid: tuple[int, int] | None = None
    tile: int = 1
    prefix: int = 0
    check: InitVar[bool] = True
    survivors: int | None = field(default=None, kw_only=True)
    selected: bool = field(default=False, kw_only=True, repr=False, compare=False)
    _ascends: bool | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self, check: bool) -> None:
        """Checks shape and dtype and, if asked to, the entries."""
        if self.indices.dtype != torch.int32:
            raise TypeError(
                f"Connectivity: indices must be int32, got {self.indices.dtype}; call indices.int()"
            )
        if (self.grid is None) == (self.survivors is None):
            raise TypeError(
                f"Connectivity: patches lie in a grid or along a curve, got grid={self.grid} and "
                f"survivors={self.survivors}; give one of them"
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
        layout = self.layout
        rows = layout.squares(self.tile)
        if self.indices.shape[2] != rows:
            raise ValueError(
                f"Connectivity: a {layout} with tile={self.tile} has {rows} rows, "
                f"got indices with {self.indices.shape[2]}"
            )
        if check and self.indices.numel() and can_be_read(self.indices):
            largest, tokens = int(self.indices.amax()), layout.tokens  # amax is faster than max
            if largest >= tokens:
                raise ValueError(
                    f"Connectivity: indices name token {largest}, but a {layout} behind {self.prefix} "
                    f"prefix tokens has the tokens 0 to {tokens - 1}; give these, -1 for empty slots, or "
                    "check=False to take others for empty slots"
                )

    @classmethod
    def over(cls, layout: Layout, indices: Tensor, tile: int, **options: Any) -> Self:
        """Lists over the tokens of a layout.

        Args:
            layout: where the tokens lie.
            indices: int32 [B, H, rows, k].
            tile: side of a tile in patches.
            options: the other arguments.
        """
        if isinstance(layout, CurveLayout):
            return cls(indices, None, tile, layout.prefix, survivors=layout.survivors, **options)
        return cls(indices, layout.raster, tile, layout.prefix, **options)

    def ascends(self) -> bool:
        """Whether the lists are known to ascend as selected ones do; seen once, waiting for the device."""
        if self.selected:
            return True
        if self._ascends is None and can_be_read(self.indices):
            before, after = self.indices[..., :-1], self.indices[..., 1:]
            in_order = (after < 0) | ((before >= 0) & (before < after))
            in_range = self.indices < self.layout.tokens
            object.__setattr__(self, "_ascends", bool(in_order.all() & in_range.all()))
        return bool(self._ascends)

    @property
    def layout(self) -> Layout:
        """Geometry of the tokens."""
        if self.grid is not None:
            return TokenLayout(self.grid, self.prefix)
        assert self.survivors is not None
        return CurveLayout(self.survivors, self.prefix)

    def alone(self) -> "Connectivity":
        """The lists for whoever has other keys and values than those that they were chosen from."""
        return self

    def to_mask(self) -> Tensor:
        """Dense mask, bool [B, H, N, N]: query i attends to key j; prefix rows are all true."""
        return self.to_counts() > 0

    def to_counts(self) -> Tensor:
        """How often the list of query i names key j, int32 [B, H, N, N]; 1 in prefix rows."""
        layout, N = self.layout, self.layout.tokens
        B, H, rows, _ = self.indices.shape
        device = self.indices.device
        slots = torch.where(self.is_key(), self.indices, N).long()
        named = torch.zeros(B, H, rows, N + 1, dtype=torch.int32, device=device)
        named = named.scatter_add(-1, slots, torch.ones_like(slots, dtype=torch.int32))
        patches = torch.arange(self.prefix, N, device=device)
        row_of_patch = layout.square_of_token(patches, self.tile)
        of_prefix = torch.ones(B, H, self.prefix, N, dtype=torch.int32, device=device)
        return torch.cat([of_prefix, named[:, :, row_of_patch, :N]], 2)

    def is_key(self) -> Tensor:
        """Which slots name a key, bool [B, H, rows, k]; the others are empty."""
        return (self.indices >= 0) & (self.indices < self.layout.tokens)

    def patches_of(self, query: tuple[int, int], head: int, image: int = 0) -> list[int]:
        """Patches that a query patch attends to one by one, row-major, in the order of its list.

        Args:
            query: row and column of the patch.
            head: attention head.
            image: place in the batch.

        Raises:
            ValueError: the query lies outside the grid, or patches were dropped and the others lie in none.
        """
        layout, (y, x) = self.layout, query
        if self.grid is None:
            raise ValueError(
                f"the layer saw a {layout}, others were dropped before; ask a layer that saw all"
            )
        height, width = self.grid
        if not (0 <= y < height and 0 <= x < width):
            raise ValueError(f"query={query} lies outside the grid of {height}x{width} patches")
        row = (y // self.tile) * layout.square_grid(self.tile)[1] + x // self.tile
        listed = self.indices[image, head, row]
        keys = listed[self.is_key()[image, head, row] & (listed >= self.prefix)]
        patches: list[int] = (keys - self.prefix).tolist()
        return patches

    def density(self) -> float:
        """Share of the N keys that a patch query attends to one by one, averaged over its rows."""
        sizes = self.layout.square_sizes(self.tile, self.indices.device)
        visits = self.is_key().sum(-1).double() * sizes
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
        return Connectivity.over(self.layout, self.indices, self.tile, check=False, selected=self.selected)
