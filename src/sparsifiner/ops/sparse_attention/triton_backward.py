"""Backward kernels: gradients of the queries by tile, of keys and values by adding up what tiles send."""

import triton
import triton.language as tl

from sparsifiner.ops.sparse_attention.triton_forward import (
    list_bias,
    list_of_program,
    load_rows,
    names_token,
    nearest_token,
    place_of_program,
    summary_counts,
    tile_tokens,
)
from sparsifiner.ops.triton_kernel import kernel, quotient


@triton.jit
def _key_gradients(query, key, value, bias, count, d_out, log_weight, delta, d_query, scale, slope):
    """One block of keys: what it adds to dq, and its own dk and dv from these queries."""
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if bias is not None:
        logits += bias
    probability = tl.exp2(logits - log_weight[:, None])
    if count is not None:
        probability *= count
    d_probability = tl.dot(d_out, tl.trans(value), input_precision="ieee")
    d_logits = (probability * (d_probability - delta[:, None]) * slope).to(query.dtype)
    d_query = tl.dot(d_logits, key, acc=d_query, input_precision="ieee")
    d_key = tl.dot(tl.trans(d_logits), query, input_precision="ieee")
    d_value = tl.dot(tl.trans(probability.to(query.dtype)), d_out, input_precision="ieee")
    return d_query, d_key, d_value


@triton.jit
def _send(
    d_k, d_v, d_key, d_value, row, is_row, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, STORE: tl.constexpr
):
    """Adds gradients [BLOCK_N, BLOCK_D] to rows of `d_k` and `d_v`, or stores them there."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    to = row.to(tl.int64)[:, None] * HEAD_DIM + dim
    mask = dim < HEAD_DIM
    if is_row is not None:
        mask = is_row[:, None] & mask
    if STORE:
        tl.store(d_k + to, d_key, mask=mask)
        tl.store(d_v + to, d_value, mask=mask)
    else:
        tl.atomic_add(d_k + to, d_key, mask=mask, sem="relaxed")
        tl.atomic_add(d_v + to, d_value, mask=mask, sem="relaxed")


@kernel
def count_kernel(
    every,  # [N]
    N,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens of the list of the prefix, which is all of them."""
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(every + token, token, mask=token < N)


@kernel
def attend_backward_kernel(
    q,  # [B, H, N, d]
    k,  # [B, H, N, d]
    v,  # [B, H, N, d]
    indices,  # [B * H, tiles, keys]
    bits,  # int64 [B * H, tiles, keys] if PACKED, else None
    lengths,  # [B * H, tiles] if PACKED, else None
    every,  # [N], all tokens
    mean_k,  # [B * H, W, d]
    mean_v,  # [B * H, W, d]
    missing,  # [B * H, tiles, W], or [B * H, patches, W] if PACKED
    out,  # [B, H, N, d]
    log_weight,  # fp32 [B * H, N]
    d_out,  # [B, H, N, d]
    d_q,  # [B, H, N, d]
    split_d_q,  # fp32 [B * H, splits, PREFIX, d]
    d_k,  # fp32 [B * H, N, d], or [B * H, entries, d] of every slot of every list
    d_v,  # likewise
    d_mean_k,  # fp32 [B * H, W, d], or [B * H, tiles * PARTS, W, d] of every program
    d_mean_v,  # likewise
    q_batch, q_head, q_token,
    k_batch, k_head, k_token,
    v_batch, v_head, v_token,
    o_batch, o_head, o_token,
    do_batch, do_head, do_token,
    dq_batch, dq_head, dq_token,
    H, N, GRID_H, GRID_W, PREFIX, tiles, keys, windows, splits, entries, scale, slope,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_END: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
    ASCENDING: tl.constexpr,
    DETERMINISTIC: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one tile, or of the prefix: dq, and what they send to their keys and summaries.

    The prefix's dq are of one split of the keys each. What is sent is added up by atomics in an order that
    no one knows, or, if DETERMINISTIC, stored by slot and added up later. `scale` holds log2(e), `slope` does
    not.
    """
    tile, part, is_prefix, split = place_of_program(tiles, splits, PARTS)
    pair = tl.program_id(1).to(tl.int64)
    row = pair * tiles + tile
    dim = tl.arange(0, BLOCK_D)[None, :]

    member = part * BLOCK_M + tl.arange(0, BLOCK_M)
    token, is_query = tile_tokens(tile, member, is_prefix, GRID_H, GRID_W, PREFIX, TILE)
    q += pair // H * q_batch + pair % H * q_head
    k += pair // H * k_batch + pair % H * k_head
    v += pair // H * v_batch + pair % H * v_head
    out += pair // H * o_batch + pair % H * o_head
    d_out += pair // H * do_batch + pair % H * do_head
    d_q += pair // H * dq_batch + pair % H * dq_head
    query = load_rows(q, token, q_token, is_query, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    d_result = load_rows(d_out, token, do_token, is_query, HEAD_DIM, BLOCK_D)
    result = load_rows(out, token, o_token, is_query, HEAD_DIM, BLOCK_D)
    delta = tl.sum(d_result.to(tl.float32) * result.to(tl.float32), 1)
    weight = tl.load(log_weight + pair * N + token, mask=is_query, other=float("inf"))
    # a query without any key has probabilities of 0
    weight = tl.where(weight == -float("inf"), float("inf"), weight)

    d_query = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tokens, length = list_of_program(
        indices, lengths, every, row, keys, N, is_prefix, split, SPLIT_KEYS, PACKED
    )
    entry = (tile * PARTS + part) * keys
    if is_prefix == 1:
        entry = tiles * PARTS * keys + part * N + split * SPLIT_KEYS
    whole = length // BLOCK_N * BLOCK_N
    for start in range(0, whole, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        index = tl.load(tokens + slot)
        listed = None
        if not ASCENDING:
            listed = names_token(index, N)
            index = nearest_token(index, N)
        key = load_rows(k, index, k_token, listed, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
        value = load_rows(v, index, v_token, listed, HEAD_DIM, BLOCK_D)
        bias = None
        if PACKED or not ASCENDING:
            bias = list_bias(listed, bits, row * keys, slot, length, member, is_prefix, PACKED)
        d_query, d_key, d_value = _key_gradients(
            query, key, value, bias, None, d_result, weight, delta, d_query, scale, slope
        )
        to = pair * entries + entry + slot if DETERMINISTIC else pair * N + index
        _send(d_k, d_v, d_key, d_value, to, listed, HEAD_DIM, BLOCK_D, DETERMINISTIC)
    for start in tl.range(whole, length, BLOCK_END, num_stages=1):
        slot = start + tl.arange(0, BLOCK_END)
        end_listed = slot < length
        index = tl.load(tokens + slot, mask=end_listed, other=0)
        if not ASCENDING:
            end_listed &= names_token(index, N)
            index = nearest_token(index, N)
        key = load_rows(k, index, k_token, end_listed, HEAD_DIM, BLOCK_D)
        value = load_rows(v, index, v_token, end_listed, HEAD_DIM, BLOCK_D)
        bias = list_bias(end_listed, bits, row * keys, slot, length, member, is_prefix, PACKED)
        d_query, d_key, d_value = _key_gradients(
            query, key, value, bias, None, d_result, weight, delta, d_query, scale, slope
        )
        to = pair * entries + entry + slot if DETERMINISTIC else pair * N + index
        _send(d_k, d_v, d_key, d_value, to, end_listed, HEAD_DIM, BLOCK_D, DETERMINISTIC)
    for start in tl.range(0, (1 - is_prefix) * windows, BLOCK_W, num_stages=1):
        window = start + tl.arange(0, BLOCK_W)
        is_window = window < windows
        key = load_rows(mean_k, pair * windows + window, HEAD_DIM, is_window, HEAD_DIM, BLOCK_D)
        value = load_rows(mean_v, pair * windows + window, HEAD_DIM, is_window, HEAD_DIM, BLOCK_D)
        count = summary_counts(missing, row, token, PREFIX, GRID_H * GRID_W, pair, window, windows, PACKED)
        bias = tl.where(count > 0, 0.0, -float("inf"))
        d_query, d_key, d_value = _key_gradients(
            query, key, value, bias, count, d_result, weight, delta, d_query, scale, slope
        )
        to = (row * PARTS + part if DETERMINISTIC else pair) * windows + window
        _send(d_mean_k, d_mean_v, d_key, d_value, to, is_window, HEAD_DIM, BLOCK_D, DETERMINISTIC)
    mask = is_query[:, None] & (dim < HEAD_DIM)
    if is_prefix == 1:
        at = (pair * splits + split) * PREFIX + token
        tl.store(split_d_q + at[:, None] * HEAD_DIM + dim, d_query, mask=mask)
    else:
        tl.store(d_q + token[:, None] * dq_token + dim, d_query.to(d_q.dtype.element_ty), mask=mask)


@kernel
def add_entries_kernel(
    entry_k,  # fp32 [B * H, entries, d]
    entry_v,  # likewise
    order,  # int64 [B * H, entries], entries by ascending token
    first,  # int64 [B * H, N + 1], where the entries of a token begin in `order`
    d_k,  # fp32 [B * H, N, d]
    d_v,  # likewise
    N, entries,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token: the sum of what was sent to it, in the order of the rows."""
    token, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    start = tl.load(first + pair * (N + 1) + token)
    stop = tl.load(first + pair * (N + 1) + token + 1)
    key_sum = tl.zeros([BLOCK_D], tl.float32)
    value_sum = tl.zeros([BLOCK_D], tl.float32)
    for block in range(start, stop, BLOCK_E):
        place = block + tl.arange(0, BLOCK_E)
        entry = tl.load(order + pair * entries + place, mask=place < stop, other=0)
        at = (pair * entries + entry)[:, None] * HEAD_DIM + dim[None, :]
        mask = (place < stop)[:, None] & (dim < HEAD_DIM)[None, :]
        key_sum += tl.sum(tl.load(entry_k + at, mask=mask, other=0.0), 0)
        value_sum += tl.sum(tl.load(entry_v + at, mask=mask, other=0.0), 0)
    to = (pair * N + token) * HEAD_DIM + dim
    tl.store(d_k + to, key_sum, mask=dim < HEAD_DIM)
    tl.store(d_v + to, value_sum, mask=dim < HEAD_DIM)


@kernel
def key_gradients_kernel(
    sum_k,  # fp32 [B * H, N, d]
    sum_v,  # likewise
    d_mean_k,  # fp32 [B * H, W, d]
    d_mean_v,  # likewise
    d_k,  # [B, H, N, d]
    d_v,  # likewise
    dk_batch, dk_head, dk_token,
    H, N, GRID_H, GRID_W, PREFIX, windows, SIDE,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tokens: their own gradients and their share in those of their window's means."""
    pair = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    dim = tl.arange(0, BLOCK_D)[None, :]
    mask = (token < N)[:, None] & (dim < HEAD_DIM)
    at = (pair * N + token)[:, None] * HEAD_DIM + dim
    key = tl.load(sum_k + at, mask=mask, other=0.0)  # [BLOCK_T, BLOCK_D]
    value = tl.load(sum_v + at, mask=mask, other=0.0)
    if windows > 0:
        patch = token - PREFIX
        y = quotient(patch, GRID_W)
        row, column = quotient(y, SIDE), quotient(patch - y * GRID_W, SIDE)
        height = tl.minimum(GRID_H - row * SIDE, SIDE)
        width = tl.minimum(GRID_W - column * SIDE, SIDE)
        share = 1.0 / tl.maximum(height * width, 1).to(tl.float32)[:, None]
        window = row * tl.cdiv(GRID_W, SIDE) + column
        of_window = (pair * windows + window)[:, None] * HEAD_DIM + dim
        in_window = mask & (patch >= 0)[:, None]
        key += tl.load(d_mean_k + of_window, mask=in_window, other=0.0) * share
        value += tl.load(d_mean_v + of_window, mask=in_window, other=0.0) * share
    to = pair // H * dk_batch + pair % H * dk_head + token[:, None].to(tl.int64) * dk_token + dim
    tl.store(d_k + to, key.to(d_k.dtype.element_ty), mask=mask)
    tl.store(d_v + to, value.to(d_v.dtype.element_ty), mask=mask)


@kernel
def add_parts_kernel(
    x,  # fp32 [pairs, parts, rows, d]
    y,  # [batches, H, rows, d]
    y_batch, y_head, y_row,
    H, parts, rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of one pair: the sum of its parts, in order."""
    row, pair = tl.program_id(0), tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for part in range(parts):
        at = ((pair * parts + part) * rows + row) * HEAD_DIM + dim
        total += tl.load(x + at, mask=dim < HEAD_DIM, other=0.0)
    to = y + pair // H * y_batch + pair % H * y_head + row.to(tl.int64) * y_row + dim
    tl.store(to, total.to(y.dtype.element_ty), mask=dim < HEAD_DIM)
