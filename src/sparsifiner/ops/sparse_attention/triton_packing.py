"""Lists of single queries packed by tile: the union of their keys, and a bit per query for each of them."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops.program import Buffer, Draft
from sparsifiner.ops.triton_kernel import fill, kernel

# Queries of a tile of this side have one bit each in 64.
PACKED_SIDE = 8


class PackedLists(NamedTuple):
    """One list per tile.

    Attributes:
        indices: int32 [B, H, tiles, keys], ascending; undefined beyond the length of a packed list.
        bits: int64 [B, H, tiles, keys], bit m for query m of the tile; None where all queries share the list.
        lengths: int32 [B, H, tiles], None likewise.
    """

    indices: Buffer
    bits: Buffer | None = None
    lengths: Buffer | None = None


def packed_keys(layout: TokenLayout, budget: int) -> int:
    """Slots of a packed list, for all keys that lists of that budget may name."""
    return min(layout.tokens, budget * PACKED_SIDE**2)


def pack_lists(draft: Draft, indices: Buffer, layout: TokenLayout) -> PackedLists:
    """Packs one list per patch query, [B, H, patches, k], over tiles of `PACKED_SIDE` squared.

    A bit cannot say that a key is named twice, so lists must ascend.
    """
    B, H, patches, budget = indices.shape
    N, tiles = layout.tokens, layout.squares(PACKED_SIDE)
    block = min(1024, triton.next_power_of_2(N))
    members = draft.empty(B, H, tiles, N, dtype=torch.int64)
    fill(draft, members, 0)
    draft.launch(
        set_bits_kernel,
        (patches, B * H),
        *(indices, members, N, tiles, *layout.grid, budget),
        SIDE=PACKED_SIDE,
        BLOCK=block,
    )
    keys = packed_keys(layout, budget)
    union = draft.empty(B, H, tiles, keys, dtype=torch.int32)
    bits = draft.empty(B, H, tiles, keys, dtype=torch.int64)
    lengths = draft.empty(B, H, tiles, dtype=torch.int32)
    draft.launch(compact_kernel, (B * H * tiles,), members, union, bits, lengths, N, keys, BLOCK=block)
    return PackedLists(union, bits, lengths)


@kernel
def set_bits_kernel(
    indices,  # [B * H, patches, budget]
    members,  # int64 [B * H, tiles, N], zero
    N,
    tiles,
    GRID_H,
    GRID_W,
    budget,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One query: sets its bit for every key of its list."""
    patch, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    y, x = patch // GRID_W, patch % GRID_W
    tile = y // SIDE * tl.cdiv(GRID_W, SIDE) + x // SIDE
    bit = tl.full([BLOCK], 1, tl.int64) << (y % SIDE * SIDE + x % SIDE).to(tl.int64)
    indices += (pair * tl.num_programs(0) + patch) * budget
    members += (pair * tiles + tile) * N
    for start in range(0, budget, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        index = tl.load(indices + slot, mask=slot < budget, other=-1)
        tl.atomic_or(members + index, bit, mask=(index >= 0) & (index < N), sem="relaxed")


@kernel
def compact_kernel(
    members,  # int64 [B * H * tiles, N]
    union,  # int32 [B * H * tiles, keys]
    bits,  # int64 [B * H * tiles, keys]
    lengths,  # int32 [B * H * tiles]
    N,
    keys,
    BLOCK: tl.constexpr,
):
    """One tile: keys that any of its queries lists, in order, with their bits."""
    tile = tl.program_id(0).to(tl.int64)
    length = tl.zeros([], tl.int32)
    for start in range(0, N, BLOCK):
        token = start + tl.arange(0, BLOCK)
        word = tl.load(members + tile * N + token, mask=token < N, other=0)
        listed = (word != 0).to(tl.int32)
        to = tile * keys + length + tl.cumsum(listed, 0) - 1
        tl.store(union + to, token, mask=listed > 0)
        tl.store(bits + to, word, mask=listed > 0)
        length += tl.sum(listed, 0)
    tl.store(lengths + tile, length)
