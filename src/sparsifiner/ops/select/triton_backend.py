"""Selection in one kernel: a search for each row's threshold, then its list in one pass."""

from statistics import NormalDist
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsifiner.layout import TokenLayout

# Scores that a program holds in registers; rows of more keys are read anew at every step.
LARGEST_BLOCK = 16_384
# Short rows share a program, so that their reductions overlap.
_SHARED_BLOCK = 2_048
# Low bits of an fp32 number that its conversion from a shorter format leaves empty.
_EMPTY_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


class OwnTokens(NamedTuple):
    """What a row without any score selects: a table, or the squares that a layout is cut into.

    Attributes:
        table: integer [rows, m], ascending, -1 last; None for squares.
        layout: where the tokens lie.
        side: side of the squares in patches.
    """

    table: Tensor | None = None
    layout: TokenLayout = TokenLayout((1, 1))
    side: int = 0

    def arguments(self) -> tuple[Tensor | int | None, ...]:
        """As the kernels take it: `own`, `m`, `GRID_H`, `GRID_W`, `PREFIX`."""
        if self.table is None:
            return None, 0, *self.layout.grid, self.layout.prefix
        return self.table.to(torch.int32).contiguous(), self.table.shape[1], 0, 0, 0


def select_topk(scores: Tensor, budget: int, forced: int, own: Tensor) -> Tensor:
    """As the reference, with the rules for special scores, forced and own tokens in the same kernel.

    Args:
        scores: [B, H, rows, N], any floating dtype.
        budget: list length k.
        forced: the first keys, in every list.
        own: integer [rows, m], what a row without any score selects, ascending, -1 last.

    Returns:
        int32 [B, H, rows, k], ascending, -1 last.
    """
    B, H, rows, N = scores.shape
    scores = (scores.float() if scores.dtype == torch.float64 else scores).contiguous()
    indices = torch.empty(B, H, rows, budget, dtype=torch.int32, device=scores.device)
    launch_select(scores.view(-1, N), indices.view(-1, budget), OwnTokens(own), rows=rows, N=N, forced=forced)
    return indices


def launch_select(
    scores: Tensor,
    indices: Tensor,
    own: OwnTokens,
    *,
    rows: int,
    N: int,
    forced: int,
    first_row: int = 0,
) -> None:
    """Selects from the first `len(indices)` rows of `scores`.

    Args:
        scores: fp32, bf16 or fp16 [at least R, at least N], rows contiguous.
        indices: int32 [R, k], written.
        own: of every row of a head.
        rows: rows of a head; row r of `scores` is row (first_row + r) % rows of its head.
        N: number of keys.
        forced: the first keys, in every list.
        first_row: see `rows`.
    """
    total, budget = indices.shape
    if not total:
        return
    block = triton.next_power_of_2(N)
    arguments = (scores, indices, *own.arguments(), total, first_row, rows, N, scores.stride(0))
    shape = program_shape(N, budget, own) | {"EMPTY_BITS": _EMPTY_BITS[scores.dtype]}
    if block > LARGEST_BLOCK:
        shape |= {"BLOCK": LARGEST_BLOCK, "num_warps": 16}
        select_long_kernel[(total,)](*arguments, budget, forced, **shape)
    else:
        grid = (triton.cdiv(total, shape["ROWS"]),)
        select_kernel[grid](*arguments, budget, forced, normal_quantile(N, budget), **shape)


def normal_quantile(N: int, budget: int) -> float:
    """How many standard deviations above the mean the best `budget` of N normal scores begin."""
    return NormalDist().inv_cdf(min(max(1 - budget / N, 0.5 / N), 1 - 0.5 / N))


def program_shape(N: int, budget: int, own: OwnTokens) -> dict[str, int]:
    """Sizes of one program: its rows, a row's keys and list, and its warps."""
    block = triton.next_power_of_2(N)
    rows = max(1, _SHARED_BLOCK // block)
    return {
        "OWN_SIDE": own.side,
        "ROWS": rows,
        "BLOCK": block,
        "BLOCK_K": triton.next_power_of_2(budget),
        # 16 scores a thread, so that several programs fit on a multiprocessor
        "num_warps": max(4, min(16, rows * block // 512)),
    }


@triton.jit
def score_codes(score, key, N, forced, EMPTY_BITS: tl.constexpr):
    """Integers in the order of fp32 scores: NaN as -inf, forced keys as +inf, beyond N the least."""
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 equals 0.0
    score = tl.where((score != score) | (key >= N), -float("inf"), score)
    score = tl.where(key < forced, float("inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> EMPTY_BITS


@triton.jit
def _lowest(EMPTY_BITS: tl.constexpr):
    """The code of -inf, which is never selected."""
    return (-2139095041) >> EMPTY_BITS


@triton.jit
def _middle(low, high):
    """Half-way between two codes, rounded up; they may be 2 ** 32 apart, so halves are added."""
    return (low >> 1) + (high >> 1) + ((low | high) & 1)


@triton.jit
def _value_code(value, low, high, EMPTY_BITS: tl.constexpr):
    """The code of a value; `high` if it is NaN, never below `low + 1` or above `high`."""
    bits = value.to(tl.int32, bitcast=True)
    code = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> EMPTY_BITS
    return tl.minimum(tl.maximum(tl.where(value == value, code, high), low + 1), high)


@triton.jit
def _thresholds(low, high, reached, beyond, k, step):
    """Three codes in low + 1 .. high to look at next: by turns as counts suggest, and the quarters."""
    half = _middle(low, high)
    span = (high - low).to(tl.float32)
    share = (reached - k).to(tl.float32) / tl.maximum(reached - beyond, 1).to(tl.float32)
    # of n keys in a gap, the number below a place is off by about the root of n
    width = (span * tl.rsqrt(tl.maximum(reached - beyond, 1).to(tl.float32))).to(tl.int32)
    guess = low + (span * share).to(tl.int32)
    is_guess = (step % 2 == 0) & (high - low > 0)
    first = tl.where(is_guess, guess - tl.minimum(width, guess - low), _middle(low, half))
    second = tl.where(is_guess, guess, half)
    third = tl.where(is_guess, guess + tl.minimum(width, high - guess), _middle(half, high))
    first = tl.minimum(tl.maximum(first, low + 1), high)
    second = tl.minimum(tl.maximum(second, first), high)
    return first, second, tl.minimum(tl.maximum(third, second), high)


@triton.jit
def _write_row_end(
    indices, row, taken, is_row, own, m, GRID_H, GRID_W, PREFIX, k, forced,
    OWN_SIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Fills the slots behind `taken` keys: with own tokens where only forced keys are there, else -1."""
    slot = tl.arange(0, BLOCK_K)[None, :]
    place = slot - taken[:, None]
    empty = (taken == forced)[:, None] & (place >= 0)
    if OWN_SIDE > 0:
        columns = tl.cdiv(GRID_W, OWN_SIDE)
        top, left = row // columns * OWN_SIDE, row % columns * OWN_SIDE
        height = tl.minimum(GRID_H - top, OWN_SIDE)[:, None]
        width = tl.minimum(GRID_W - left, OWN_SIDE)[:, None]
        token = PREFIX + (top[:, None] + place // width) * GRID_W + left[:, None] + place % width
        value = tl.where(empty & (place < height * width), token, -1)
    else:
        value = tl.load(own + row[:, None] * m + place, mask=empty & (place < m), other=-1)
    tl.store(indices[:, None] + slot, value, mask=is_row[:, None] & (place >= 0) & (slot < k))


@triton.jit
def write_lists(
    score,  # fp32 [ROWS, BLOCK]
    key,  # [1, BLOCK]
    indices,  # [ROWS] pointers
    row,  # [ROWS], in its head
    is_row,  # [ROWS]
    own, m, GRID_H, GRID_W, PREFIX, N, k, forced, quantile,
    EMPTY_BITS: tl.constexpr,
    OWN_SIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Finds the code of the k-th largest score of each row and writes every key above it, in order.

    A key equal to the threshold is taken while there is room, lowest index first. The search counts at three
    codes a step and begins where the threshold would be if scores were normally distributed: `quantile`
    standard deviations above their mean. It ends where exactly k keys reach the threshold, at the latest
    when it is exact.
    """
    code = score_codes(score, key, N, forced, EMPTY_BITS)
    finite = tl.where((key >= forced) & (key < N) & (tl.abs(score) < float("inf")), score, 0.0)
    mean = tl.sum(finite, 1) / N
    deviation = tl.sqrt(tl.maximum(tl.sum(finite * finite, 1) / N - mean * mean, 0.0))
    # reached keys have codes of at least low, beyond ones more than high
    low = tl.full([code.shape[0]], _lowest(EMPTY_BITS), tl.int32)
    high = tl.maximum(tl.max(code, 1), low)
    reached = tl.zeros_like(low) + N
    beyond = tl.zeros_like(low)
    searching = is_row & (high > low) & (reached > k)
    first = _value_code(mean + (quantile - 0.1) * deviation, low, high, EMPTY_BITS)
    second = tl.maximum(first, _value_code(mean + quantile * deviation, low, high, EMPTY_BITS))
    third = tl.maximum(second, _value_code(mean + (quantile + 0.1) * deviation, low, high, EMPTY_BITS))
    step = 0
    while tl.max(searching.to(tl.int32), 0) > 0:
        # three counts fit in one word
        of_two = (code >= first[:, None]).to(tl.int32) + ((code >= second[:, None]).to(tl.int32) << 16)
        counts = tl.sum(of_two.to(tl.int64) + ((code >= third[:, None]).to(tl.int64) << 32), 1)
        of_first, of_second = (counts & 0xFFFF).to(tl.int32), ((counts >> 16) & 0xFFFF).to(tl.int32)
        of_third = (counts >> 32).to(tl.int32)
        # from the lowest up: what reaches k keys raises low, what does not lowers high
        low = tl.where(searching & (of_first >= k), first, low)
        reached = tl.where(searching & (of_first >= k), of_first, reached)
        low = tl.where(searching & (of_second >= k), second, low)
        reached = tl.where(searching & (of_second >= k), of_second, reached)
        low = tl.where(searching & (of_third >= k), third, low)
        reached = tl.where(searching & (of_third >= k), of_third, reached)
        high = tl.where(searching & (of_third < k), third - 1, high)
        beyond = tl.where(searching & (of_third < k), of_third, beyond)
        high = tl.where(searching & (of_second < k), second - 1, high)
        beyond = tl.where(searching & (of_second < k), of_second, beyond)
        high = tl.where(searching & (of_first < k), first - 1, high)
        beyond = tl.where(searching & (of_first < k), of_first, beyond)
        searching = searching & (high > low) & (reached > k)
        first, second, third = _thresholds(low, high, reached, beyond, k, step)
        step += 1

    above = (code > low[:, None]).to(tl.int32)
    room = tl.where(low > _lowest(EMPTY_BITS), k - tl.sum(above, 1), 0)[:, None]
    equal = ((code == low[:, None]) & (key < N)).to(tl.int32)
    # both counts fit in half a word
    counts = tl.cumsum(above + (equal << 16), 1)
    equals = counts >> 16
    place = (counts & 0xFFFF) + tl.minimum(equals, room)
    keep = ((above > 0) | ((equal > 0) & (equals <= room))) & is_row[:, None]
    tl.store(indices[:, None] + place - 1, key + tl.zeros_like(place), mask=keep)
    taken = tl.sum(keep.to(tl.int32), 1)
    _write_row_end(indices, row, taken, is_row, own, m, GRID_H, GRID_W, PREFIX, k, forced, OWN_SIDE, BLOCK_K)


@triton.jit
def select_kernel(
    scores,  # [R, stride]
    indices,  # [R, k]
    own,  # [rows, m] or None
    m, GRID_H, GRID_W, PREFIX, total, first_row, rows, N, stride, k, forced, quantile,
    EMPTY_BITS: tl.constexpr,
    OWN_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROWS rows of scores, at once in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < total
    key = tl.arange(0, BLOCK)[None, :]
    score = tl.load(scores + row[:, None] * stride + key, mask=is_row[:, None] & (key < N), other=0.0)
    own_row = ((first_row + row) % rows).to(tl.int32)
    write_lists(
        score.to(tl.float32), key, indices + row * k, own_row, is_row,
        own, m, GRID_H, GRID_W, PREFIX, N, k, forced, quantile, EMPTY_BITS, OWN_SIDE, BLOCK_K,
    )  # fmt: skip


@triton.jit
def select_long_kernel(
    scores,  # [R, stride]
    indices,  # [R, k]
    own,  # [rows, m] or None
    m, GRID_H, GRID_W, PREFIX, total, first_row, rows, N, stride, k, forced,
    EMPTY_BITS: tl.constexpr,
    OWN_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of any length: as `write_lists`, block by block, with the threshold found bit by bit."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    indices += row * k
    block = tl.arange(0, BLOCK)
    lowest = _lowest(EMPTY_BITS)

    threshold = tl.full([], -(1 << (31 - EMPTY_BITS)), tl.int32)
    candidate = tl.zeros([], tl.int32)
    for bit in range(31 - EMPTY_BITS, -1, -1):
        count = tl.zeros([], tl.int32)
        for start in range(0, N, BLOCK):
            key = start + block
            score = tl.load(scores + key, mask=key < N, other=0.0).to(tl.float32)
            count += tl.sum(
                ((score_codes(score, key, N, forced, EMPTY_BITS) >= candidate) & (key < N)).to(tl.int32), 0
            )
        threshold = tl.where(count >= k, candidate, threshold)
        candidate = threshold + (1 << tl.maximum(bit - 1, 0))
    threshold = tl.maximum(threshold, lowest)

    above = tl.zeros([], tl.int32)
    for start in range(0, N, BLOCK):
        key = start + block
        score = tl.load(scores + key, mask=key < N, other=0.0).to(tl.float32)
        above += tl.sum((score_codes(score, key, N, forced, EMPTY_BITS) > threshold).to(tl.int32), 0)
    room = tl.where(threshold > lowest, k - above, 0)

    taken = tl.zeros([1], tl.int32)
    equals = tl.zeros([1], tl.int32)
    for start in range(0, N, BLOCK):
        key = start + block
        score = tl.load(scores + key, mask=key < N, other=0.0).to(tl.float32)
        code = score_codes(score, key, N, forced, EMPTY_BITS)
        equal = ((code == threshold) & (key < N)).to(tl.int32)
        counts = tl.cumsum((code > threshold).to(tl.int32) + (equal << 16), 0)
        equals_before = equals + (counts >> 16)
        place = taken + (counts & 0xFFFF) + tl.minimum(equals_before, room) - tl.minimum(equals, room)
        keep = (code > threshold) | ((equal > 0) & (equals_before <= room))
        tl.store(indices + place - 1, key, mask=keep)
        taken += tl.sum(keep.to(tl.int32), 0)
        equals += tl.sum(equal, 0)
    own_row = ((first_row + row) % rows).to(tl.int32) + tl.zeros_like(taken)
    _write_row_end(
        indices + tl.zeros([1], tl.int64), own_row, taken, taken >= 0,
        own, m, GRID_H, GRID_W, PREFIX, k, forced, OWN_SIDE, BLOCK_K,
    )  # fmt: skip
