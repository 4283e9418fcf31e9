"""The forward kernel: attention over lists and summaries, and what it shares with the backward kernel."""

import triton
import triton.language as tl

from sparsifiner.ops.triton_kernel import kernel


@triton.jit
def place_of_program(tiles, splits, PARTS: tl.constexpr):
    """Tile, its part, 1 for the prefix or else 0, and which split of the prefix's long list.

    The prefix comes first, so that its programs hide behind those of the tiles.
    """
    prefix_programs = tl.num_programs(0) - tiles * PARTS
    program = tl.program_id(0) - prefix_programs
    of_prefix = program + prefix_programs
    tile = tl.where(program < 0, 0, program // PARTS)
    part = tl.where(program < 0, of_prefix // splits, program % PARTS)
    return tile, part, (program < 0).to(tl.int32), of_prefix % splits


@triton.jit
def tile_tokens(tile, member, is_prefix, GRID_H, GRID_W, PREFIX, TILE: tl.constexpr):
    """Raster tokens, int64, of the members of a tile, or of the prefix, and which of them exist."""
    columns = tl.cdiv(GRID_W, TILE)
    y = tile // columns * TILE + member // TILE
    x = tile % columns * TILE + member % TILE
    inside = (member < (1 - is_prefix) * TILE * TILE) & (y < GRID_H) & (x < GRID_W)
    token = tl.where(member < is_prefix * PREFIX, member, PREFIX + y * GRID_W + x)
    return token.to(tl.int64), (member < is_prefix * PREFIX) | inside


@triton.jit
def list_of_program(
    indices,
    lengths,
    every,
    row,
    keys,
    N,
    is_prefix,
    split,
    SPLIT_KEYS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """A program's list, and its slots before the empty ones at its end; the prefix lists all, by splits."""
    tokens = indices + row * keys
    length = tl.load(lengths + row) if PACKED else keys
    if is_prefix == 1:
        tokens = every + split * SPLIT_KEYS
        length = tl.minimum(N - split * SPLIT_KEYS, SPLIT_KEYS)
    elif not PACKED:
        # most lists have no empty slot
        while (length > 0) & (tl.load(tokens + tl.maximum(length - 1, 0)) < 0):
            length -= 1
    return tokens, length


@triton.jit
def names_token(index, N):
    """Which slots of a list name a token; the others are empty."""
    return (index >= 0) & (index < N)


@triton.jit
def nearest_token(index, N):
    """Lists of callers are not trusted: no number in them leads outside of the N tokens."""
    return tl.minimum(tl.maximum(index, 0), N - 1)


@triton.jit
def list_bias(listed, bits, first_slot, slot, length, member, is_prefix, PACKED: tl.constexpr):
    """0 for keys to attend to, -inf for others: [1 or BLOCK_M, BLOCK_N]; `listed` is None for all of them."""
    if PACKED:
        bias = bits_bias(bits + first_slot, slot, length, member, is_prefix)
        if listed is not None:
            bias += tl.where(listed, 0.0, -float("inf"))[None, :]
    else:
        bias = tl.where(listed, 0.0, -float("inf"))[None, :]
    return bias


@triton.jit
def load_rows(x, index, x_token, listed, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a head by their tokens: [BLOCK_N, BLOCK_D]; rows that are not `listed`, if given, are 0."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    at = x + index.to(tl.int64)[:, None] * x_token + dim
    if listed is None and HEAD_DIM == BLOCK_D:
        return tl.load(at)
    mask = dim < HEAD_DIM
    if listed is not None:
        mask = listed[:, None] & mask
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def bits_bias(bits, slot, length, member, is_prefix):
    """0 for keys that a query attends to, -inf for others: [BLOCK_M, BLOCK_N]; the prefix has no bits."""
    word = tl.load(bits + slot, mask=slot < (1 - is_prefix) * length, other=-1)
    bit = (word[None, :] >> tl.minimum(member, 63).to(tl.int64)[:, None]) & 1
    return tl.where(bit == 1, 0.0, -float("inf"))


@triton.jit
def summary_counts(missing, row, token, PREFIX, patches, pair, window, windows, PACKED: tl.constexpr):
    """Tokens that a summary stands for, fp32: [1, BLOCK_W], or one row per query if PACKED."""
    if PACKED:
        # queries that are not there read another's row
        patch = tl.minimum(tl.maximum(token - PREFIX, 0), patches - 1)
        at = (pair * patches + patch)[:, None] * windows + window[None, :]
    else:
        at = (row * windows + window)[None, :]
    return tl.load(missing + at, mask=(window < windows)[None, :], other=0).to(tl.float32)


@triton.jit
def _add_keys(query, key, value, bias, count, best, weight, total, scale):
    """Online softmax over more keys, in bits.

    `bias` [1 or BLOCK_M, BLOCK_N], if given, is -inf for keys to leave out; a key counts `count` times.
    """
    logits = tl.dot(query, tl.trans(key), input_precision="ieee")
    if bias is None:
        new_best = tl.maximum(best, tl.max(logits, 1) * scale)
        probability = tl.exp2(logits * scale - new_best[:, None])
        decay = tl.exp2(best - new_best)
    else:
        logits = logits * scale + bias
        new_best = tl.maximum(best, tl.max(logits, 1))
        # a query that has met no key yet keeps a weight of 0
        shift = tl.where(new_best == -float("inf"), 0.0, new_best)
        probability = tl.exp2(logits - shift[:, None])
        decay = tl.exp2(best - shift)
    if count is not None:
        probability *= count
    weight = weight * decay + tl.sum(probability, 1)
    total = tl.dot(probability.to(value.dtype), value, acc=total * decay[:, None], input_precision="ieee")
    return new_best, weight, total


@triton.jit
def _join_splits(
    split_out, split_log_weight, token, is_query, PREFIX, splits,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mean of the splits' results [BLOCK_M, BLOCK_D] by their weights, and log2 of all weight."""
    dim = tl.arange(0, BLOCK_D)[None, :]
    mask = is_query[:, None] & (dim < HEAD_DIM)
    largest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for split in range(splits):
        log_share = tl.load(split_log_weight + split * PREFIX + token, mask=is_query, other=0.0)
        largest = tl.maximum(largest, log_share, propagate_nan=tl.PropagateNan.ALL)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(splits):
        at = split * PREFIX + token
        share = tl.exp2(tl.load(split_log_weight + at, mask=is_query, other=0.0) - largest)
        weight += share
        total += tl.load(split_out + at[:, None] * HEAD_DIM + dim, mask=mask, other=0.0) * share[:, None]
    return total / weight[:, None], largest + tl.log2(weight)


@kernel
def attend_kernel(
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
    split_out,  # fp32 [B * H, splits, PREFIX, d]
    split_log_weight,  # fp32 [B * H, splits, PREFIX]
    arrived,  # int32 [B * H, parts of the prefix], 0 before: splits that are done
    q_batch, q_head, q_token,
    k_batch, k_head, k_token,
    v_batch, v_head, v_token,
    o_batch, o_head, o_token,
    H, N, GRID_H, GRID_W, PREFIX, tiles, keys, windows, splits, scale,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SUMMARY_STAGES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
    ASCENDING: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one tile, or of the prefix, over its list, then over all summaries.

    `scale`, at least 0, holds log2(e), so that logits are in bits; `log_weight` is the log2 of the softmax's
    denominator. The prefix's results are of one split of the keys each; the last one to be done joins them.
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
    query = load_rows(q, token, q_token, is_query, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]

    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    tokens, length = list_of_program(
        indices, lengths, every, row, keys, N, is_prefix, split, SPLIT_KEYS, PACKED
    )
    whole = length // BLOCK_N * BLOCK_N
    end_slot = whole + tl.arange(0, BLOCK_N)
    end_listed = end_slot < length
    end_index = tl.load(tokens + end_slot, mask=end_listed, other=0)
    if not ASCENDING:
        end_listed &= names_token(end_index, N)
        end_index = nearest_token(end_index, N)
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
        best, weight, total = _add_keys(query, key, value, bias, None, best, weight, total, scale)
    # what is left of the list arrives while the summaries are added
    end_key = load_rows(k, end_index, k_token, end_listed, HEAD_DIM, BLOCK_D)
    end_value = load_rows(v, end_index, v_token, end_listed, HEAD_DIM, BLOCK_D)
    for start in tl.range(0, (1 - is_prefix) * windows, BLOCK_W, num_stages=SUMMARY_STAGES):
        window = start + tl.arange(0, BLOCK_W)
        is_window = window < windows
        key = load_rows(mean_k, pair * windows + window, HEAD_DIM, is_window, HEAD_DIM, BLOCK_D)
        value = load_rows(mean_v, pair * windows + window, HEAD_DIM, is_window, HEAD_DIM, BLOCK_D)
        count = summary_counts(missing, row, token, PREFIX, GRID_H * GRID_W, pair, window, windows, PACKED)
        bias = tl.where(count > 0, 0.0, -float("inf"))
        best, weight, total = _add_keys(query, key, value, bias, count, best, weight, total, scale)
    if whole < length:
        bias = list_bias(end_listed, bits, row * keys, end_slot, length, member, is_prefix, PACKED)
        best, weight, total = _add_keys(query, end_key, end_value, bias, None, best, weight, total, scale)

    total = total / tl.where(weight > 0, weight, 1.0)[:, None]
    log_total = best + tl.log2(weight)
    mask = is_query[:, None] & (dim < HEAD_DIM)
    if is_prefix == 1:
        at = (pair * splits + split) * PREFIX + token
        tl.store(split_out + at[:, None] * HEAD_DIM + dim, total, mask=mask)
        tl.store(split_log_weight + at, log_total, mask=is_query)
        # what all threads stored is released with the count, and acquired by whoever counts last
        tl.debug_barrier()
        before = tl.atomic_add(arrived + pair * tl.cdiv(PREFIX, BLOCK_M) + part, 1, sem="acq_rel")
        if before == splits - 1:
            tl.debug_barrier()
            total, log_total = _join_splits(
                split_out + pair * splits * PREFIX * HEAD_DIM, split_log_weight + pair * splits * PREFIX,
                token, is_query, PREFIX, splits, HEAD_DIM, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            tl.store(out + token[:, None] * o_token + dim, total.to(out.dtype.element_ty), mask=mask)
            tl.store(log_weight + pair * N + token, log_total, mask=is_query)
    else:
        tl.store(out + token[:, None] * o_token + dim, total.to(out.dtype.element_ty), mask=mask)
        tl.store(log_weight + pair * N + token, log_total, mask=is_query)
