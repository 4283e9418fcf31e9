"""Selection in one kernel: a search for each row's threshold, then its list in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Scores that a program holds in registers; rows of more keys are read anew at every step.
_LARGEST_BLOCK = 16_384
# Short rows share a program, so that their reductions overlap.
_SHARED_BLOCK = 2_048
# Low bits of an fp32 number that its conversion from a shorter format leaves empty.
_EMPTY_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


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
    launch_select(scores.view(-1, N), indices.view(-1, budget), own, N=N, forced=forced)
    return indices


def launch_select(
    scores: Tensor, indices: Tensor, own: Tensor, *, N: int, forced: int, first_row: int = 0
) -> None:
    """Selects from the first `len(indices)` rows of `scores`.

    Args:
        scores: fp32, bf16 or fp16 [at least R, at least N], rows contiguous.
        indices: int32 [R, k], written.
        own: integer [rows, m]; row r of `scores` is row (first_row + r) % rows of it.
        N: number of keys.
        forced: the first keys, in every list.
        first_row: see `own`.
    """
    total, budget = indices.shape
    if not total:
        return
    own = own.to(torch.int32).contiguous()
    shape = {"EMPTY_BITS": _EMPTY_BITS[scores.dtype], "BLOCK_K": triton.next_power_of_2(budget)}
    arguments = (scores, own, indices, total, first_row, own.shape[0], N, scores.stride(0), budget, forced)
    block = triton.next_power_of_2(N)
    if block > _LARGEST_BLOCK:
        select_long_kernel[(total,)](*arguments, own.shape[1], **shape, BLOCK=_LARGEST_BLOCK, num_warps=16)
    else:
        shape |= _program_shape(block)
        select_kernel[(triton.cdiv(total, shape["ROWS"]),)](*arguments, own.shape[1], **shape)


def select_lowrank(
    coefficients: Tensor,
    basis: Tensor,
    coef_topk: int,
    budget: int,
    forced: int,
    own: Tensor,
    scores: Tensor | None = None,
) -> Tensor:
    """Lists of the scores C̃ Ũᵀ, which never reach memory.

    Args:
        coefficients: C, fp32 [B, H, rows, K]; of each row the `coef_topk` largest count.
        basis: Ũᵀ, fp32 [K, N].
        coef_topk: coefficients that are kept.
        budget: list length k.
        forced: the first keys, in every list.
        own: integer [rows, m], what a row without any score selects, ascending, -1 last.
        scores: fp32 [B, H, rows, N] to write the scores to, for tests.

    Returns:
        int32 [B, H, rows, k], ascending, -1 last.
    """
    B, H, rows, K = coefficients.shape
    N = basis.shape[1]
    block = triton.next_power_of_2(N)
    assert block <= _LARGEST_BLOCK
    own = own.to(torch.int32).contiguous()
    indices = torch.empty(B, H, rows, budget, dtype=torch.int32, device=coefficients.device)
    total = B * H * rows
    shape = _program_shape(block)
    if total:
        select_lowrank_kernel[(triton.cdiv(total, shape["ROWS"]),)](
            *(coefficients.contiguous(), basis.contiguous(), own, indices, scores),
            *(total, rows, N, K, coef_topk, budget, forced, own.shape[1]),
            BLOCK_K=triton.next_power_of_2(budget),
            BLOCK_BASIS=triton.next_power_of_2(K),
            WRITE_SCORES=scores is not None,
            **shape,
        )
    return indices


def _program_shape(block: int) -> dict[str, int]:
    """Rows of one program and its warps."""
    return {
        "BLOCK": block,
        "ROWS": max(1, _SHARED_BLOCK // block),
        "num_warps": max(4, min(16, block // 1024)),
    }


@triton.jit
def _codes(score, key, N, forced, EMPTY_BITS: tl.constexpr):
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
def _middle(low, high, reached, beyond, k, step):
    """Where to look next for the threshold, in low + 1 .. high: by turns as counts suggest, and half-way."""
    span = (high - low).to(tl.float32)
    share = (reached - k).to(tl.float32) / tl.maximum(reached - beyond, 1).to(tl.float32)
    guess = low + (span * share).to(tl.int32)
    # codes of both signs are 2 ** 32 apart, so halves are added, not differences halved
    half = (low >> 1) + (high >> 1) + ((low | high) & 1)
    middle = tl.where((step % 2 == 0) & (high - low > 0), guess, half)
    return tl.minimum(tl.maximum(middle, low + 1), high)


@triton.jit
def _write_row_end(own, indices, taken, forced, k, m, is_row, BLOCK_K: tl.constexpr):
    """Fills the slots behind `taken` keys: with own tokens where only forced keys are there, else -1."""
    slot = tl.arange(0, BLOCK_K)[None, :]
    fill = tl.where(taken == forced, m, 0)[:, None]
    token = slot - taken[:, None]
    value = tl.load(own[:, None] + token, mask=is_row[:, None] & (token >= 0) & (token < fill), other=-1)
    tl.store(indices[:, None] + slot, value, mask=is_row[:, None] & (token >= 0) & (slot < k))


@triton.jit
def _write_lists(
    code,  # [ROWS, BLOCK]
    key,  # [1, BLOCK]
    own,  # [ROWS] pointers
    indices,  # [ROWS] pointers
    is_row,  # [ROWS]
    N,
    k,
    forced,
    m,
    EMPTY_BITS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Finds the code of the k-th largest score of each row and writes every key above it, in order.

    A key equal to the threshold is taken while there is room, lowest index first. The search ends where
    exactly k keys reach the threshold, at the latest when it is exact.
    """
    # reached keys have codes of at least low, beyond ones more than high
    low = tl.full([code.shape[0]], _lowest(EMPTY_BITS), tl.int32)
    high = tl.maximum(tl.max(code, 1), low)
    reached = tl.zeros_like(low) + N
    beyond = tl.zeros_like(low)
    searching = is_row & (high > low) & (reached > k)
    step = 0
    while tl.max(searching.to(tl.int32), 0) > 0:
        middle = _middle(low, high, reached, beyond, k, step)
        count = tl.sum((code >= middle[:, None]).to(tl.int32), 1)
        enough = searching & (count >= k)
        short = searching & (count < k)
        low = tl.where(enough, middle, low)
        reached = tl.where(enough, count, reached)
        high = tl.where(short, middle - 1, high)
        beyond = tl.where(short, count, beyond)
        searching = searching & (high > low) & (reached > k)
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
    _write_row_end(own, indices, taken, forced, k, m, is_row, BLOCK_K)


@triton.jit
def select_kernel(
    scores,  # [R, stride]
    own,  # [rows, m]
    indices,  # [R, k]
    total,
    first_row,
    rows,
    N,
    stride,
    k,
    forced,
    m,
    EMPTY_BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """ROWS rows of scores, at once in registers."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < total
    key = tl.arange(0, BLOCK)[None, :]
    score = tl.load(scores + row[:, None] * stride + key, mask=is_row[:, None] & (key < N), other=0.0)
    code = _codes(score.to(tl.float32), key, N, forced, EMPTY_BITS)
    own += (first_row + row) % rows * m
    _write_lists(code, key, own, indices + row * k, is_row, N, k, forced, m, EMPTY_BITS, BLOCK_K)


@triton.jit
def select_lowrank_kernel(
    coefficients,  # [B * H * rows, K]
    basis,  # [K, N]
    own,  # [rows, m]
    indices,  # [B * H * rows, k]
    scores,  # [B * H * rows, N] or None
    total,
    rows,
    N,
    K,
    coef_topk,
    k,
    forced,
    m,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_BASIS: tl.constexpr,
    WRITE_SCORES: tl.constexpr,
):
    """ROWS rows: their largest coefficients one by one, lowest index first, each times its basis row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < total
    key = tl.arange(0, BLOCK)[None, :]
    base = tl.arange(0, BLOCK_BASIS)[None, :]
    weight = tl.load(coefficients + row[:, None] * K + base, mask=is_row[:, None] & (base < K), other=-1.0)
    score = tl.zeros([ROWS, BLOCK], tl.float32)
    for _ in range(coef_topk):
        largest = tl.max(weight, 1)
        # rows that hold NaN have no largest one, and their scores become NaN
        at = tl.minimum(tl.min(tl.where(weight == largest[:, None], base, BLOCK_BASIS), 1), K - 1)
        part = tl.load(basis + at[:, None] * N + key, mask=is_row[:, None] & (key < N), other=0.0)
        score += tl.sum(tl.where(base == at[:, None], weight, 0.0), 1)[:, None] * part
        weight = tl.where(base == at[:, None], -1.0, weight)
    if WRITE_SCORES:
        tl.store(scores + row[:, None] * N + key, score, mask=is_row[:, None] & (key < N))
    code = _codes(score, key, N, forced, 0)
    _write_lists(code, key, own + row % rows * m, indices + row * k, is_row, N, k, forced, m, 0, BLOCK_K)


@triton.jit
def select_long_kernel(
    scores,  # [R, stride]
    own,  # [rows, m]
    indices,  # [R, k]
    total,
    first_row,
    rows,
    N,
    stride,
    k,
    forced,
    m,
    EMPTY_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row of any length: as `_write_lists`, block by block, with the threshold found bit by bit."""
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
                ((_codes(score, key, N, forced, EMPTY_BITS) >= candidate) & (key < N)).to(tl.int32), 0
            )
        threshold = tl.where(count >= k, candidate, threshold)
        candidate = threshold + (1 << tl.maximum(bit - 1, 0))
    threshold = tl.maximum(threshold, lowest)

    above = tl.zeros([], tl.int32)
    for start in range(0, N, BLOCK):
        key = start + block
        score = tl.load(scores + key, mask=key < N, other=0.0).to(tl.float32)
        above += tl.sum((_codes(score, key, N, forced, EMPTY_BITS) > threshold).to(tl.int32), 0)
    room = tl.where(threshold > lowest, k - above, 0)

    taken = tl.zeros([1], tl.int32)
    equals = tl.zeros([1], tl.int32)
    for start in range(0, N, BLOCK):
        key = start + block
        score = tl.load(scores + key, mask=key < N, other=0.0).to(tl.float32)
        code = _codes(score, key, N, forced, EMPTY_BITS)
        equal = ((code == threshold) & (key < N)).to(tl.int32)
        counts = tl.cumsum((code > threshold).to(tl.int32) + (equal << 16), 0)
        equals_before = equals + (counts >> 16)
        place = taken + (counts & 0xFFFF) + tl.minimum(equals_before, room) - tl.minimum(equals, room)
        keep = (code > threshold) | ((equal > 0) & (equals_before <= room))
        tl.store(indices + place - 1, key, mask=keep)
        taken += tl.sum(keep.to(tl.int32), 0)
        equals += tl.sum(equal, 0)
    first = tl.zeros([1], tl.int64)
    own += (first_row + row) % rows * m
    _write_row_end(own + first, indices + first, taken, forced, k, m, taken >= 0, BLOCK_K)
