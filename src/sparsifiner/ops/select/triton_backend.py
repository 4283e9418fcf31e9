"""Selection in Triton: launches of the kernels that search a row's threshold and write its list."""

from dataclasses import replace
from statistics import NormalDist
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from sparsifiner import tuned
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops.program import Buffer, Draft, operation
from sparsifiner.ops.select.triton_kernels import select_kernel, select_long_kernel
from sparsifiner.ops.triton_counts import Begun

# Scores that a program holds in registers; rows of more keys are read anew at every step.
LARGEST_BLOCK = 16_384
# Elements to whose multiples rows of scores are padded.
_ALIGNMENT = 16
# Bits of a word.
_WORD = 32
# Sizes of counts that are not made.
_NO_COUNTS = {"BLOCK_COUNT": 1, "BLOCK_W": 1}
# Low bits of an fp32 number that its conversion from a shorter format leaves empty.
_EMPTY_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


class OwnTokens(NamedTuple):
    """What a row without any score selects: a table, or the squares that a layout is cut into.

    Attributes:
        table: int32 [rows, m], ascending, -1 last; None for squares.
        layout: where the tokens lie.
        side: side of the squares in patches.
    """

    table: Buffer | None = None
    layout: TokenLayout = TokenLayout((1, 1))
    side: int = 0

    def arguments(self) -> tuple[Buffer | int | None, ...]:
        """As the kernels take it: `own`, `m`, `GRID_H`, `GRID_W`, `PREFIX`."""
        if self.table is None:
            return None, 0, *self.layout.grid, self.layout.prefix
        return self.table, self.table.shape[1], 0, 0, 0


def select_topk(scores: Tensor, budget: int, forced: int, own: Tensor) -> Tensor:
    """See `sparsifiner.ops.select_topk`; rules for special scores, forced and own tokens in the kernel."""
    scores = scores.float() if scores.dtype == torch.float64 else scores
    own = own.to(torch.int32).contiguous()
    return _select_topk(scores.contiguous(), own, budget=budget, forced=forced)[0]


@operation
def _select_topk(draft: Draft, scores: Buffer, own: Buffer, *, budget: int, forced: int) -> tuple[Buffer]:
    B, H, rows, N = scores.shape
    indices = draft.empty(B, H, rows, budget, dtype=torch.int32)
    flat = replace(scores, shape=(B * H * rows, N), strides=(N, 1)).since(forced, 1)
    launch_select(draft, flat, indices, OwnTokens(own), rows=rows, forced=forced)
    return (indices,)


def padded_length(N: int) -> int:
    """Length of a row of N scores that is read in whole vectors."""
    return max(1, triton.cdiv(N, _ALIGNMENT)) * _ALIGNMENT


def launch_select(
    draft: Draft,
    scores: Buffer,
    indices: Buffer,
    own: OwnTokens,
    *,
    rows: int,
    forced: int,
    first_row: int = 0,
    row_of_indices: int = 0,
    limit: int = 0,
    begun: Begun | None = None,
) -> None:
    """Selects for each row of `scores`.

    Args:
        draft: what is written to.
        scores: fp32, bf16 or fp16 [R, N], of all keys but the first `forced`; rows contiguous.
        indices: int32 [B, H, rows, k], written.
        own: of every row of a head.
        rows: rows of a head; row r of `scores` is row (first_row + r) % rows of its head.
        forced: keys before those that have scores, in every list.
        first_row: see `rows`.
        row_of_indices: row of all of `indices` that the first row of `scores` selects for.
        limit: length to which rows may be read, -inf beyond N, if that is more than N.
        begun: what attention begins with, to be written beside the lists; only where `is_one_block` says so.
    """
    (total, N), budget = scores.shape, indices.shape[-1]
    shape = program_shape(N, budget, own) | {"EMPTY_BITS": _EMPTY_BITS[scores.dtype]}
    listed = replace(indices, shape=(indices.elements // budget, budget), strides=(budget, 1))
    listed = listed.since(row_of_indices, 0)
    arguments = (scores, listed, *own.arguments(), total, first_row, rows, N, scores.strides[0])
    if shape["BLOCK"] > LARGEST_BLOCK:
        shape = {**shape, "BLOCK": LARGEST_BLOCK, "num_warps": 16}
        del shape["ROWS"]
        draft.launch(select_long_kernel, (total,), *arguments, budget, forced, **shape)
    else:
        counted = (None, None, None) if begun is None else begun.since(row_of_indices)
        sizes, blocks = ((0, 1, 0), _NO_COUNTS) if begun is None else (begun.sizes(), begun.blocks())
        draft.launch(
            select_kernel,
            (triton.cdiv(total, shape["ROWS"]),),
            *(*arguments, max(N, limit), budget, forced, normal_quantile(N, budget - forced)),
            *(*counted, *sizes),
            **blocks,
            **shape,
        )


def is_one_block(N: int) -> bool:
    """Whether a program holds all scores of a row."""
    return max(_WORD, triton.next_power_of_2(N)) <= LARGEST_BLOCK


def normal_quantile(N: int, budget: int) -> float:
    """How many standard deviations above the mean the best `budget` of N normal scores begin."""
    rank = min(max(budget, 0.5), N - 0.5)
    return NormalDist().inv_cdf(1 - rank / N) if N > 1 else 0.0


def program_shape(N: int, budget: int, own: OwnTokens) -> dict[str, int]:
    """Sizes of one program: its rows, a row's keys and list, and its warps.

    At one share of the keys they are alike for all N up to a power of two, so that few kernels are compiled.
    """
    block = max(_WORD, triton.next_power_of_2(N))
    rows = max(1, tuned.SHARED_SCORES // block)
    return {
        "OWN_SIDE": own.side,
        "ROWS": rows,
        "BLOCK": block,
        "BLOCK_K": triton.next_power_of_2(triton.cdiv(budget * block, max(1, N))),
        # 32 scores a thread, so that several programs fit on a multiprocessor
        "num_warps": max(2, min(16, rows * block // 1024)),
    }
