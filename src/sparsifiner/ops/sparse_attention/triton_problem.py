"""Sizes of a call of sparse attention in Triton, forward and backward."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from sparsifiner import tuned
from sparsifiner.geometry.grid import TokenLayout, layout_of
from sparsifiner.ops.program import Buffer, Draft
from sparsifiner.ops.sparse_attention.triton_packing import (
    PACKED_SIDE,
    PackedLists,
    pack_lists,
    packed_keys,
)

LOG2_E = 1.4426950408889634

# what has the shape of queries or lists
Shaped = Buffer | Tensor


@dataclass(frozen=True)
class Problem:
    """The sizes of one call.

    Attributes:
        geometry: of the layout, with the side of a tile of queries that share a list (1 for a list per query)
            and of a window (0 for no summaries).
        scale: factor of the logits.
        ascending: whether lists ascend as those of `select_topk` do, and are read as they are.
    """

    geometry: tuple[int, ...]
    scale: float
    ascending: bool

    @property
    def layout(self) -> TokenLayout:
        """Where the tokens lie."""
        return layout_of(self.geometry)

    @property
    def tile(self) -> int:
        """Side of a tile of queries that share a list."""
        return self.geometry[3]

    @property
    def summary(self) -> int:
        """Side of the windows."""
        return self.geometry[4]

    @property
    def rows(self) -> int:
        """Lists per batch element and head."""
        return self.layout.squares(self.tile)

    @property
    def packed(self) -> bool:
        """Whether lists of single queries are packed by tile."""
        return self.tile == 1 and self.ascending

    @property
    def side(self) -> int:
        """Side of the tile of queries that a program attends for."""
        return PACKED_SIDE if self.packed else self.tile

    @property
    def tiles(self) -> int:
        """Tiles per batch element and head."""
        return self.layout.squares(self.side)

    @property
    def windows(self) -> int:
        """Summary keys."""
        return self.layout.squares(self.summary) if self.summary else 0

    @property
    def queries(self) -> int:
        """Places of queries in a tile: rows of its side, of which there are no more than the grid has."""
        return self.layout.square_shape(self.side)[0] * self.side

    def block_m(self, q: Shaped) -> int:
        """Queries of one program; larger tiles are divided."""
        largest = tuned.ATTEND_QUERIES
        if q.dtype == torch.float32:  # whose products take registers instead of matrix units
            largest = tuned.ATTEND_QUERIES_FP32[q.shape[-1] > 64]
        return max(16, min(largest, triton.next_power_of_2(self.queries)))

    def parts(self, q: Shaped) -> int:
        """Programs of one tile."""
        return triton.cdiv(self.queries, self.block_m(q))

    def prefix_parts(self, q: Shaped) -> int:
        """Parts of the prefix, each with a program per split."""
        return triton.cdiv(self.layout.prefix, self.block_m(q))

    @property
    def splits(self) -> int:
        """Parts of all tokens, to which the prefix attends."""
        return triton.cdiv(self.layout.tokens, tuned.PREFIX_KEYS)

    def grid(self, q: Shaped) -> tuple[int, int]:
        """Programs: those of the prefix and of all tiles, for each batch element and head."""
        return self.prefix_parts(q) * self.splits + self.tiles * self.parts(q), q.shape[0] * q.shape[1]

    def entries(self, q: Shaped, indices: Shaped) -> int:
        """Slots of all programs of a head: of what its lists send, and of what the prefix sends."""
        keys = packed_keys(self.layout, indices.shape[-1]) if self.packed else indices.shape[-1]
        return self.tiles * self.parts(q) * keys + self.prefix_parts(q) * self.layout.tokens


def lists_by_tile(draft: Draft, indices: Buffer, problem: Problem) -> PackedLists:
    """One list per tile, with bits where single queries are packed."""
    return pack_lists(draft, indices, problem.layout) if problem.packed else PackedLists(indices)


def block_d(q: Shaped) -> int:
    """Channels of a head that a program holds."""
    return max(16, triton.next_power_of_2(q.shape[-1]))


def block_n(q: Shaped) -> int:
    """Keys of one step."""
    return tuned.ATTEND_KEYS_FP32 if q.dtype == torch.float32 else tuned.ATTEND_KEYS


def blocks(q: Shaped, problem: Problem) -> dict[str, int]:
    """Sizes that the kernels are compiled for."""
    return {
        "HEAD_DIM": q.shape[-1],
        "TILE": problem.side,
        "PARTS": problem.parts(q),
        "BLOCK_M": problem.block_m(q),
        "SPLIT_KEYS": tuned.PREFIX_KEYS,
        "BLOCK_N": block_n(q),
        "BLOCK_W": max(16, min(block_n(q), triton.next_power_of_2(max(1, problem.windows)))),
        "BLOCK_D": block_d(q),
        "PACKED": problem.packed,
        "ASCENDING": problem.ascending,
        # four warps hold no more than 64 x 64 of the sums without spilling
        "num_warps": 8 if problem.block_m(q) * block_d(q) > 64 * 64 else 4,
    }
