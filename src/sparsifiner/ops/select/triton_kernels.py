"""Selection in one kernel: a search for each row's threshold, then its list in one pass."""

import triton
import triton.language as tl

from sparsifiner.ops.triton_counts import begin_prefix, count_missing
from sparsifiner.ops.triton_kernel import kernel

# Standard deviations around the first guess of a threshold that are looked at.
_MARGIN = tl.constexpr(0.05)


@triton.jit
def _code(value, EMPTY_BITS: tl.constexpr):
    """Integers in the order of fp32 values."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> EMPTY_BITS


@triton.jit
def _value(code, EMPTY_BITS: tl.constexpr):
    """The value of a code."""
    bits = (code << EMPTY_BITS) | ((code >> 31) & ((1 << EMPTY_BITS) - 1))
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _lowest(EMPTY_BITS: tl.constexpr):
    """The code of -inf, which is never selected."""
    return (-2139095041) >> EMPTY_BITS


@triton.jit
def _first_thresholds(score, N, quantile, low, high, EMPTY_BITS: tl.constexpr):
    """Codes below and above the place where the selection would begin if scores were normally distributed."""
    finite = tl.where(tl.abs(score) < float("inf"), score, 0.0)
    count = tl.maximum(N, 1)
    mean = tl.sum(finite, 1) / count
    deviation = tl.sqrt(tl.maximum(tl.sum(finite * finite, 1) / count - mean * mean, 0.0))
    lower = mean + (quantile - _MARGIN) * deviation
    upper = mean + (quantile + _MARGIN) * deviation
    # sums beyond what fp32 holds tell nothing
    first = tl.where(lower == lower, _code(lower, EMPTY_BITS), high)
    second = tl.where(upper == upper, _code(upper, EMPTY_BITS), high)
    return _clip(first, second, low, high)


@triton.jit
def _next_thresholds(low, high, reached, beyond, k, step):
    """Codes to look at next: twice around the place that the counts suggest, then the thirds."""
    count = tl.maximum(reached - beyond, 1).to(tl.float32)
    # as unsigned, since codes may be 2 ** 32 apart
    span = (high - low).to(tl.uint32, bitcast=True)
    third = (span // 3).to(tl.int32)
    guess = low + (span.to(tl.float32) * ((reached - k).to(tl.float32) / count)).to(tl.int32)
    # of n keys in a gap, the number below a place is off by about the root of n
    width = (span.to(tl.float32) * tl.rsqrt(count) * 0.5).to(tl.int32)
    is_guess = (step % 3 < 2) & (high - low > 0)
    first = tl.where(is_guess, guess - tl.minimum(width, guess - low), low + third + 1)
    second = tl.where(is_guess, guess + 1 + tl.minimum(width, high - guess), low + third + third + 1)
    return _clip(first, second, low, high)


@triton.jit
def _clip(first, second, low, high):
    first = tl.minimum(tl.maximum(first, low + 1), high)
    return first, tl.minimum(tl.maximum(second, first), high)


@triton.jit
def _write_row_end(
    indices, row, taken, is_row, own, m, GRID_H, GRID_W, PREFIX, k,
    OWN_SIDE: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Fills the slots behind `taken` keys: with own tokens where there is no key, else -1."""
    slot = tl.arange(0, BLOCK_K)[None, :]
    place = slot - taken[:, None]
    empty = (taken == 0)[:, None] & (place >= 0)
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
def _words(flags):
    """Flags [ROWS, BLOCK] as the bits of int32 words [ROWS, BLOCK // 32]."""
    parts: tl.constexpr = flags.shape[1] // 32
    bits = tl.reshape(flags.to(tl.int32), [flags.shape[0], parts, 32]) << tl.arange(0, 32)[None, None, :]
    return tl.sum(bits, 2)


@triton.jit
def _ones(words):
    """How many bits of each word are set."""
    x = words.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def write_lists(
    score,  # fp32 [ROWS, BLOCK], -inf beyond N
    indices,  # [ROWS] pointers to the slots of N keys with scores
    row,  # [ROWS], in its head
    is_row,  # [ROWS]
    own, m, GRID_H, GRID_W, PREFIX, N, k, first_key, quantile,
    EMPTY_BITS: tl.constexpr,
    OWN_SIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Finds the k-th largest of N scores of each row and writes every key above it, in order.

    Keys are numbered from `first_key`. NaN counts as -inf, which is never selected. A key equal to the
    threshold is taken while there is room, lowest index first. The search counts at two thresholds a step.
    It ends where exactly k keys reach one, at the latest when it is exact.
    """
    score = tl.maximum(score, -float("inf"))
    # reached keys have codes of at least low, beyond ones more than high
    low = tl.full([score.shape[0]], _lowest(EMPTY_BITS), tl.int32)
    high = tl.maximum(_code(tl.max(score, 1), EMPTY_BITS), low)
    reached = tl.zeros_like(low) + N
    beyond = tl.zeros_like(low)
    first, second = _first_thresholds(score, N, quantile, low, high, EMPTY_BITS)
    step = 0
    while tl.max((is_row & (high > low) & (reached > k)).to(tl.int32), 0) > 0:
        at_first = (score >= _value(first, EMPTY_BITS)[:, None]).to(tl.int32)
        at_second = (score >= _value(second, EMPTY_BITS)[:, None]).to(tl.int32)
        # two counts fit in one word
        counts = tl.sum(at_first + (at_second << 16), 1)
        of_first, of_second = counts & 0xFFFF, counts >> 16
        first_is_low, second_is_low = of_first >= k, of_second >= k
        low = tl.where(second_is_low, second, tl.where(first_is_low, first, low))
        reached = tl.where(second_is_low, of_second, tl.where(first_is_low, of_first, reached))
        high = tl.where(second_is_low, high, tl.where(first_is_low, second, first) - 1)
        beyond = tl.where(second_is_low, beyond, tl.where(first_is_low, of_second, of_first))
        first, second = _next_thresholds(low, high, reached, beyond, k, step)
        step += 1

    threshold = _value(low, EMPTY_BITS)[:, None]
    above = _words(score > threshold)  # [ROWS, BLOCK // 32]
    equal = _words((score == threshold) & (low > _lowest(EMPTY_BITS))[:, None])
    room = tl.where(reached > k, k - beyond, k)[:, None]
    # both counts fit in half a word
    of_above, of_equal = _ones(above), _ones(equal)
    counts = of_above + (of_equal << 16)
    before = tl.cumsum(counts, 1) - counts
    room_left = tl.maximum(room - (before >> 16), 0)
    slot = (before & 0xFFFF) + tl.minimum(before >> 16, room)
    key = first_key + tl.arange(0, above.shape[1])[None, :] * 32
    bits = (above | equal) & tl.where(is_row, -1, 0)[:, None]
    for _ in range(tl.max(tl.max(of_above + of_equal, 1), 0)):
        lowest = bits & -bits
        is_equal = (equal & lowest) != 0
        keep = (bits != 0) & ((room_left > 0) | (is_equal == 0))
        # the exponent of a power of two
        place = (lowest.to(tl.uint32, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127
        tl.store(indices[:, None] + slot, key + place, mask=keep)
        slot += keep.to(tl.int32)
        room_left -= is_equal.to(tl.int32)
        bits = bits ^ lowest
    taken = tl.max(slot, 1)
    if tl.min(tl.where(is_row, taken, k), 0) < k:
        _write_row_end(indices, row, taken, is_row, own, m, GRID_H, GRID_W, PREFIX, k, OWN_SIDE, BLOCK_K)


@kernel
def select_kernel(
    scores,  # [R, stride], of which `limit` are read, -inf beyond N
    indices,  # [R, budget]
    own,  # [rows, m] or None
    m, GRID_H, GRID_W, PREFIX, total, first_row, rows, N, stride, limit, budget, forced, quantile,
    missing,  # [R, windows] or None
    every,  # [tokens] or None
    arrived,  # [parts] or None
    windows, SIDE, parts,
    BLOCK_COUNT: tl.constexpr,
    BLOCK_W: tl.constexpr,
    EMPTY_BITS: tl.constexpr,
    OWN_SIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """ROWS rows of scores, at once in registers; beside their lists what attention begins with, if asked."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < total
    key = tl.arange(0, BLOCK)[None, :]
    mask = is_row[:, None] & (key < limit)
    score = tl.load(scores + row[:, None] * stride + key, mask=mask, other=-float("inf")).to(tl.float32)
    own_row = ((first_row + row) % rows).to(tl.int32)
    lists = indices + row * budget
    write_forced(lists, is_row, forced)
    write_lists(
        score, lists + forced, own_row, is_row,
        own, m, GRID_H, GRID_W, PREFIX, N, budget - forced, forced, quantile, EMPTY_BITS, OWN_SIDE, BLOCK_K,
    )  # fmt: skip
    if missing is not None:
        begin_prefix(every, arrived, PREFIX + GRID_H * GRID_W, parts, BLOCK_COUNT)
        tl.debug_barrier()  # all threads see the lists
        for place in tl.static_range(ROWS):
            one = tl.program_id(0).to(tl.int64) * ROWS + place
            if one < total:
                count_missing(
                    indices + one * budget, missing + one * windows, budget,
                    GRID_H, GRID_W, PREFIX, windows, SIDE, BLOCK_COUNT, BLOCK_W, True,
                )  # fmt: skip


@triton.jit
def write_forced(indices, is_row, forced):
    """The first slots of every row hold the first keys."""
    for key in range(forced):
        tl.store(indices + key, key, mask=is_row)


@kernel
def select_long_kernel(
    scores,  # [R, stride]
    indices,  # [R, budget]
    own,  # [rows, m] or None
    m, GRID_H, GRID_W, PREFIX, total, first_row, rows, N, stride, budget, forced,
    EMPTY_BITS: tl.constexpr,
    OWN_SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One row of any length: as `write_lists`, block by block, with the threshold found bit by bit."""
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride
    indices += row * budget
    k = budget - forced
    block = tl.arange(0, BLOCK)

    code = tl.full([], -(1 << (31 - EMPTY_BITS)), tl.int32)
    candidate = tl.zeros([], tl.int32)
    for bit in range(31 - EMPTY_BITS, -1, -1):
        count = tl.zeros([], tl.int32)
        for start in range(0, N, BLOCK):
            count += tl.sum(
                (_code(_load_block(scores, start + block, N), EMPTY_BITS) >= candidate).to(tl.int32), 0
            )
        code = tl.where(count >= k, candidate, code)
        candidate = code + (1 << tl.maximum(bit - 1, 0))
    threshold = _value(tl.maximum(code, _lowest(EMPTY_BITS)), EMPTY_BITS)

    above = tl.zeros([], tl.int32)
    for start in range(0, N, BLOCK):
        above += tl.sum((_load_block(scores, start + block, N) > threshold).to(tl.int32), 0)
    room = k - above

    taken = tl.zeros([1], tl.int32)
    equals = tl.zeros([1], tl.int32)
    for start in range(0, N, BLOCK):
        score = _load_block(scores, start + block, N)
        equal = (score == threshold) & (score > -float("inf"))
        counts = tl.cumsum((score > threshold).to(tl.int32) + (equal.to(tl.int32) << 16), 0)
        equals_before = equals + (counts >> 16)
        place = taken + (counts & 0xFFFF) + tl.minimum(equals_before, room) - tl.minimum(equals, room)
        keep = (score > threshold) | (equal & (equals_before <= room))
        tl.store(indices + forced + place - 1, forced + start + block, mask=keep)
        taken += tl.sum(keep.to(tl.int32), 0)
        equals += tl.sum(equal.to(tl.int32), 0)
    own_row = ((first_row + row) % rows).to(tl.int32) + tl.zeros_like(taken)
    indices += tl.zeros([1], tl.int64)
    write_forced(indices, taken >= 0, forced)
    _write_row_end(
        indices + forced, own_row, taken, taken >= 0,
        own, m, GRID_H, GRID_W, PREFIX, k, OWN_SIDE, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _load_block(scores, key, N):
    score = tl.load(scores + key, mask=key < N, other=-float("inf")).to(tl.float32)
    return tl.maximum(score, -float("inf"))
