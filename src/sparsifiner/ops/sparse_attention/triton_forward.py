"""Forward kernels: the tokens of each window that a list lacks, and attention over lists and summaries."""

import triton
import triton.language as tl


@triton.jit
def missing_kernel(
    indices,  # [B * H * rows, k]
    missing,  # [B * H * rows, W]
    k, GRID_H, GRID_W, PREFIX, windows,
    SIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One row: how many tokens of each window its list lacks."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.cdiv(GRID_W, SIDE)
    window = tl.arange(0, BLOCK_W)
    height = tl.minimum(GRID_H - window // columns * SIDE, SIDE)
    width = tl.minimum(GRID_W - window % columns * SIDE, SIDE)
    count = height * width
    for start in range(0, k, BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        patch = tl.load(indices + row * k + slot, mask=slot < k, other=-1) - PREFIX
        listed = patch // GRID_W // SIDE * columns + patch % GRID_W // SIDE
        count -= tl.histogram(tl.where(patch >= 0, listed, 0), BLOCK_W, mask=patch >= 0)
    tl.store(missing + row * windows + window, count.to(missing.dtype.element_ty), mask=window < windows)


@triton.jit
def tile_of_program(tiles, PARTS: tl.constexpr):
    """Tile, its part, and 1 for the prefix, which comes first so that its long list hides, else 0."""
    prefix_parts = tl.num_programs(0) - tiles * PARTS
    program = tl.program_id(0) - prefix_parts
    tile = tl.where(program < 0, 0, program // PARTS)
    part = tl.where(program < 0, program + prefix_parts, program % PARTS)
    return tile, part, (program < 0).to(tl.int32)


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
def load_list(indices, slot, keys, N, is_prefix):
    """Tokens of a block of slots, -1 where there is none; the prefix lists every token."""
    index = tl.load(indices + slot, mask=slot < (1 - is_prefix) * keys, other=-1)
    return tl.where(slot < is_prefix * N, slot, index)


@triton.jit
def list_bias(index, bits, slot, length, member, is_prefix, PACKED: tl.constexpr):
    """0 for keys that a query attends to, -inf for others: [1, BLOCK_N], or [BLOCK_M, BLOCK_N] if PACKED."""
    allowed = (index >= 0)[None, :]
    if PACKED:
        word = tl.load(bits + slot, mask=slot < (1 - is_prefix) * length, other=-1)
        bit = (word[None, :] >> tl.minimum(member, 63).to(tl.int64)[:, None]) & 1
        allowed = allowed & (bit == 1)
    return tl.where(allowed, 0.0, -float("inf"))


@triton.jit
def summary_bias(missing, row, token, PREFIX, patches, pair, window, windows, PACKED: tl.constexpr):
    """log2 of the tokens that a summary stands for: [1, BLOCK_W], or one row per query if PACKED."""
    if PACKED:
        # queries that are not there read another's row
        patch = tl.minimum(tl.maximum(token - PREFIX, 0), patches - 1)
        at = (pair * patches + patch)[:, None] * windows + window[None, :]
    else:
        at = (row * windows + window)[None, :]
    count = tl.load(missing + at, mask=(window < windows)[None, :], other=0)
    return tl.log2(count.to(tl.float32))


@triton.jit
def _add_keys(query, key, value, bias, best, weight, total, scale):
    """Online softmax over more keys: bias [1 or BLOCK_M, BLOCK_N] in bits, -inf for keys to leave out."""
    logits = tl.dot(query, tl.trans(key), input_precision="ieee") * scale + bias
    new_best = tl.maximum(best, tl.max(logits, 1))
    # a query that has met no key yet keeps a weight of 0
    shift = tl.where(new_best == -float("inf"), 0.0, new_best)
    probability = tl.exp2(logits - shift[:, None])
    decay = tl.exp2(best - shift)
    weight = weight * decay + tl.sum(probability, 1)
    total = tl.dot(probability.to(value.dtype), value, acc=total * decay[:, None], input_precision="ieee")
    return new_best, weight, total


@triton.jit
def attend_kernel(
    q,  # [B, H, N, d]
    k,  # [B, H, N, d]
    v,  # [B, H, N, d]
    indices,  # [B * H, tiles, keys]
    bits,  # int64 [B * H, tiles, keys] if PACKED, else None
    lengths,  # [B * H, tiles] if PACKED, else None
    mean_k,  # [B * H, W, d]
    mean_v,  # [B * H, W, d]
    missing,  # [B * H, tiles, W], or [B * H, patches, W] if PACKED
    out,  # [B, H, N, d]
    log_weight,  # fp32 [B * H, N]
    q_batch, q_head, q_token,
    k_batch, k_head, k_token,
    v_batch, v_head, v_token,
    o_batch, o_head, o_token,
    H, N, GRID_H, GRID_W, PREFIX, tiles, keys, windows, scale,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one tile, or of the prefix, over its list, then over all summaries.

    `scale` holds log2(e), so that logits are in bits; `log_weight` is the log2 of the softmax's denominator.
    """
    tile, part, is_prefix = tile_of_program(tiles, PARTS)
    pair = tl.program_id(1).to(tl.int64)
    row = pair * tiles + tile
    dim = tl.arange(0, BLOCK_D)[None, :]
    is_dim = dim < HEAD_DIM

    member = part * BLOCK_M + tl.arange(0, BLOCK_M)
    token, is_query = tile_tokens(tile, member, is_prefix, GRID_H, GRID_W, PREFIX, TILE)
    q += pair // H * q_batch + pair % H * q_head
    k += pair // H * k_batch + pair % H * k_head
    v += pair // H * v_batch + pair % H * v_head
    out += pair // H * o_batch + pair % H * o_head
    mask = is_query[:, None] & is_dim
    query = tl.load(q + token[:, None] * q_token + dim, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_D]

    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    length = tl.load(lengths + row) if PACKED else keys
    for start in range(0, tl.where(is_prefix == 1, N, length), BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        index = load_list(indices + row * keys, slot, length, N, is_prefix)
        listed = (index >= 0)[:, None] & is_dim
        at = index.to(tl.int64)[:, None]
        key = tl.load(k + at * k_token + dim, mask=listed, other=0.0)  # [BLOCK_N, BLOCK_D]
        value = tl.load(v + at * v_token + dim, mask=listed, other=0.0)
        bias = list_bias(
            index, bits + row * keys if PACKED else None, slot, length, member, is_prefix, PACKED
        )
        best, weight, total = _add_keys(query, key, value, bias, best, weight, total, scale)
    for start in range(0, (1 - is_prefix) * windows, BLOCK_W):
        window = start + tl.arange(0, BLOCK_W)
        at = (pair * windows + window)[:, None] * HEAD_DIM + dim
        is_window = (window < windows)[:, None] & is_dim
        key = tl.load(mean_k + at, mask=is_window, other=0.0)  # [BLOCK_W, BLOCK_D]
        value = tl.load(mean_v + at, mask=is_window, other=0.0)
        bias = summary_bias(missing, row, token, PREFIX, GRID_H * GRID_W, pair, window, windows, PACKED)
        best, weight, total = _add_keys(query, key, value, bias, best, weight, total, scale)

    total = total / tl.where(weight > 0, weight, 1.0)[:, None]
    tl.store(out + token[:, None] * o_token + dim, total.to(out.dtype.element_ty), mask=mask)
    tl.store(log_weight + pair * N + token, best + tl.log2(weight), mask=is_query)
