"""Selection in one kernel: a search for the threshold, then the list in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Scores of a row that one program holds in registers; longer rows are read anew at every step.
_LARGEST_BLOCK = 16_384
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
    own = own.to(torch.int32).contiguous()
    indices = torch.empty(B, H, rows, budget, dtype=torch.int32, device=scores.device)
    block = min(_LARGEST_BLOCK, triton.next_power_of_2(N))
    select_kernel[(B * H * rows,)](
        scores,
        own,
        indices,
        rows,
        N,
        budget,
        forced,
        own.shape[1],
        EMPTY_BITS=_EMPTY_BITS[scores.dtype],
        BLOCK=block,
        BLOCK_K=min(block, triton.next_power_of_2(budget)),
        IN_REGISTERS=block >= N,
        num_warps=max(1, min(16, block // 1024)),
    )
    return indices


@triton.jit
def _codes(scores, offset, N, forced, EMPTY_BITS: tl.constexpr):
    """Integers in the order of the scores: NaN as -inf, forced keys as +inf, beyond N the least."""
    score = tl.load(scores + offset, mask=offset < N, other=-float("inf")).to(tl.float32)
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 equals 0.0
    score = tl.where(score != score, -float("inf"), score)
    score = tl.where(offset < forced, float("inf"), score)
    bits = score.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> EMPTY_BITS


@triton.jit
def select_kernel(
    scores,  # [B * H * rows, N]
    own,  # [rows, m]
    indices,  # [B * H * rows, k]
    rows,
    N,
    k,
    forced,
    m,
    EMPTY_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
):
    """One row: the code of the k-th largest score bit by bit, then every key above it in order.

    A key equal to the threshold is taken while there is room, lowest index first. The search stops early
    where exactly k keys reach the threshold.
    """
    row = tl.program_id(0).to(tl.int64)
    scores += row * N
    indices += row * k
    block = tl.arange(0, BLOCK)
    # the code of -inf, which is never selected
    nothing: tl.constexpr = (-2139095041) >> EMPTY_BITS
    if IN_REGISTERS:
        code = _codes(scores, block, N, forced, EMPTY_BITS)

    threshold = tl.full([], -(1 << (31 - EMPTY_BITS)), tl.int32)
    reached = N
    step = tl.full([], 1 << (30 - EMPTY_BITS), tl.int32)
    candidate = tl.zeros([], tl.int32)
    while (step >= 0) & (reached != k):
        if IN_REGISTERS:
            count = tl.sum((code >= candidate).to(tl.int32), 0)
        else:
            count = tl.zeros([], tl.int32)
            for start in range(0, N, BLOCK):
                part = _codes(scores, start + block, N, forced, EMPTY_BITS)
                count += tl.sum((part >= candidate).to(tl.int32), 0)
        enough = count >= k
        threshold = tl.where(enough, candidate, threshold)
        reached = tl.where(enough, count, reached)
        candidate = threshold + step
        # one more round after the lowest bit
        step = tl.where(step == 0, -1, step >> 1)

    above = tl.zeros([], tl.int32)
    if not IN_REGISTERS:
        for start in range(0, N, BLOCK):
            part = _codes(scores, start + block, N, forced, EMPTY_BITS)
            above += tl.sum((part > tl.maximum(threshold, nothing)).to(tl.int32), 0)
    else:
        above += tl.sum((code > tl.maximum(threshold, nothing)).to(tl.int32), 0)
    room = tl.where(threshold > nothing, k - above, 0)
    threshold = tl.maximum(threshold, nothing)

    taken = tl.zeros([], tl.int32)
    equals = tl.zeros([], tl.int32)
    for start in range(0, N, BLOCK):
        offset = start + block
        if not IN_REGISTERS:
            code = _codes(scores, offset, N, forced, EMPTY_BITS)
        equal = (code == threshold) & (offset < N)
        # counts of a block fit in half a word each
        counts = tl.cumsum((code > threshold).to(tl.int32) + (equal.to(tl.int32) << 16), 0)
        equals_before = equals + (counts >> 16)
        place = taken + (counts & 0xFFFF) + tl.minimum(equals_before, room) - tl.minimum(equals, room)
        keep = (code > threshold) | (equal & (equals_before <= room))
        tl.store(indices + place - 1, offset, mask=keep)
        taken += tl.sum(keep.to(tl.int32), 0)
        equals += tl.sum(equal.to(tl.int32), 0)

    own += (row % rows) * m
    fill = tl.where(taken == forced, m, 0)
    for start in range(0, k, BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        token = tl.load(own + slot - taken, mask=(slot >= taken) & (slot - taken < fill), other=-1)
        tl.store(indices + slot, token, mask=(slot >= taken) & (slot < k))
