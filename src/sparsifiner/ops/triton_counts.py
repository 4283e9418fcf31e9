"""What attention over lists begins with: counts of what they lack, and the list of the prefix.

A launch of its own makes it, or the selection does beside its lists.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from sparsifiner.geometry.grid import layout_of
from sparsifiner.ops.program import Buffer, Draft
from sparsifiner.ops.triton_kernel import kernel, quotient

# Slots of a list whose windows are counted at once.
_COUNTED_SLOTS = 512


class Begun(NamedTuple):
    """What attention begins with, beside the lists.

    Attributes:
        missing: tokens of each window that each list lacks, [B, H, rows, W].
        every: int32 [N], all tokens: the list of the prefix.
        arrived: int32 [B * H, parts of the prefix], 0: splits of the prefix that are done.
        side: of a window.
    """

    missing: Buffer
    every: Buffer
    arrived: Buffer
    side: int

    @classmethod
    def make(
        cls, draft: Draft, q: Buffer, geometry: tuple[int, ...], dtype: torch.dtype, parts: int
    ) -> "Begun":
        """Memory for it, which a launch is still to write.

        Args:
            draft: what is written to.
            q: [B, H, N, d] queries.
            geometry: of the layout, with the sides of a tile and of a window, 0 for no summaries.
            dtype: of the counts.
            parts: of the prefix.
        """
        (B, H, N, _), layout, (tile, side) = q.shape, layout_of(geometry), geometry[3:]
        windows = layout.squares(side) if side else 0
        return cls(
            draft.empty(B, H, layout.squares(tile), windows, dtype=dtype),
            draft.empty(N, dtype=torch.int32),
            draft.empty(B * H, parts, dtype=torch.int32),
            max(1, side),
        )

    def sizes(self) -> tuple[int, int, int]:
        """As kernels take them: `windows`, `SIDE`, `parts`."""
        return self.missing.shape[3], self.side, self.arrived.elements

    def blocks(self) -> dict[str, int]:
        """Sizes that kernels are compiled for; what "auto" makes of windows does not reach a second one."""
        windows = max(128, triton.next_power_of_2(self.missing.shape[3]))
        return {"BLOCK_COUNT": _COUNTED_SLOTS, "BLOCK_W": windows}

    def since(self, row: int) -> tuple[Any, ...]:
        """As kernels take them: `missing` from a row of all lists on, `every` and `arrived`."""
        windows = self.missing.shape[3]
        rows = Buffer(self.missing.memory, (row + 1, windows), (windows, 1), self.missing.dtype)
        return rows.since(row, 0), self.every, self.arrived


@kernel
def missing_kernel(
    indices,  # [B * H * rows, budget]
    missing,  # [B * H * rows, W]
    every,  # [N], all tokens: the list of the prefix
    arrived,  # [B * H, parts], set to 0: splits of the prefix that are done
    budget, N, GRID_H, GRID_W, PREFIX, windows, SIDE, parts,
    BLOCK_COUNT: tl.constexpr,
    BLOCK_W: tl.constexpr,
    ASCENDING: tl.constexpr,
):  # fmt: skip
    """One row: how many tokens of each window its list lacks; all together: what the prefix begins with."""
    row = tl.program_id(0).to(tl.int64)
    begin_prefix(every, arrived, N, parts, BLOCK_COUNT)
    count_missing(
        indices + row * budget, missing + row * windows, budget, GRID_H, GRID_W, PREFIX, windows, SIDE,
        BLOCK_COUNT, BLOCK_W, ASCENDING,
    )  # fmt: skip


@triton.jit
def begin_prefix(every, arrived, N, parts, BLOCK_N: tl.constexpr):
    """All programs of a launch together write the list of the prefix, and that none of its splits is done."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    for start in range(program * BLOCK_N, N, programs * BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        tl.store(every + token, token, mask=token < N)
    for start in range(program * BLOCK_N, parts, programs * BLOCK_N):
        part = start + tl.arange(0, BLOCK_N)
        tl.store(arrived + part, tl.zeros([BLOCK_N], tl.int32), mask=part < parts)


@triton.jit
def count_missing(
    indices, missing, budget, GRID_H, GRID_W, PREFIX, windows, SIDE,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, ASCENDING: tl.constexpr,
):  # fmt: skip
    """How many tokens of each window one list lacks, each once, however often it is named."""
    columns = tl.cdiv(GRID_W, SIDE)
    window = tl.arange(0, BLOCK_W)
    height = tl.minimum(GRID_H - window // columns * SIDE, SIDE)
    width = tl.minimum(GRID_W - window % columns * SIDE, SIDE)
    count = height * width
    for start in range(0, budget, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        token = tl.load(indices + slot, mask=slot < budget, other=-1)
        patch = token - PREFIX
        is_new = (patch >= 0) & (patch < GRID_H * GRID_W)
        if not ASCENDING:
            for before in range(0, tl.minimum(start + BLOCK_N, budget)):
                is_new &= (tl.load(indices + before) != token) | (slot <= before)
        y = quotient(patch, GRID_W)
        listed = quotient(y, SIDE) * columns + quotient(patch - y * GRID_W, SIDE)
        count -= tl.histogram(tl.where(is_new, listed, 0), BLOCK_W, mask=is_new)
    tl.store(missing + window, count.to(missing.dtype.element_ty), mask=window < windows)
