"""Sparse attention in torch operations: gather the listed keys, then fused attention per row."""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparsifiner import tuned
from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.layout import Side
from sparsifiner.ops.dense import dense_attention
from sparsifiner.ops.precision import accumulation_dtype
from sparsifiner.ops.sparse_attention import masked
from sparsifiner.ops.sparse_attention.summaries import unselected_per_window, window_means

# Rows take the place of heads in fused attention, and CUDA kernels launch no more than these.
_CHUNK_ROWS = 65_535


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    connectivity: Connectivity,
    summary: Side | None,
    scale: float,
    fused: bool = True,
) -> Tensor:
    """Same function as the reference; no tensor grows with N * N, but for short inputs on a GPU.

    Keys and values, summaries behind them, form one table per batch element and head. Every row
    gathers its list and the summaries from it and attends to them at once. Rows are taken in
    chunks; with gradients each chunk gathers anew in the backward, so that what is kept between
    the passes does not grow with the lists. Under transforms of `torch.func`, which cannot do so, it does.

    Arguments and result are those of the reference; with `fused` torch's fused kernels are taken, which have
    no second derivatives.
    """
    layout, tile, prefix = connectivity.layout, connectivity.tile, connectivity.prefix
    if not torch.compiler.is_compiling() and not q.numel():  # of no image torch's fused kernels make None
        return q * k * v
    # a mask moves less memory on a GPU than gathering every query's own keys, but takes N * N of it
    is_short = tile == 1 and layout.tokens <= tuned.MASKED_TOKENS
    if q.is_cuda and fused and is_short and connectivity.ascends():
        return masked.sparse_attention(q, k, v, connectivity, summary, scale)
    B, H, N, d = q.shape
    indices = connectivity.indices
    bias = torch.where(connectivity.is_key(), 0.0, -torch.inf)  # [B, H, rows, k]
    slots = indices.clamp(0, N - 1).long()
    key, value = k, v
    if summary is not None:
        key = torch.cat([k, window_means(k, layout, summary)], 2)  # [B, H, N + W, d]
        value = torch.cat([v, window_means(v, layout, summary)], 2)
        unselected = unselected_per_window(connectivity, summary)  # [B, H, rows, W]
        windows = torch.arange(N, key.shape[2], device=q.device).expand(unselected.shape)
        bias = torch.cat([bias, unselected.to(accumulation_dtype(q.dtype)).log()], -1)
        slots = torch.cat([slots, windows], -1)
    keys_per_row = slots.shape[-1]
    first_slot = torch.arange(B * H, device=q.device).view(B, H, 1, 1) * key.shape[2]
    slots = (slots + first_slot).reshape(-1, keys_per_row)
    bias = bias.to(q.dtype).reshape(-1, 1, keys_per_row)
    key, value = key.reshape(-1, d), value.reshape(-1, d)
    tiles = layout.split_squares(q[:, :, prefix:], tile)  # [B, H, rows, m, d]
    query = tiles.reshape(-1, *tiles.shape[3:])

    attend = _attend
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        # recomputing takes hooks of saved tensors, which transforms do not have
        attend = _attend if _transforms() else _attend_recomputing
    row_bytes = keys_per_row * d * key.element_size()
    chunk_bytes = tuned.GATHERED_BYTES.get(q.device.type, tuned.GATHERED_BYTES["cuda"])
    rows_per_chunk = min(_CHUNK_ROWS, max(1, chunk_bytes // row_bytes))
    # compiled and exported code is for any batch: its chunks grow with B, their number does not; a GPU could
    # not launch such chunks
    for_any_batch = torch.compiler.is_compiling() and not q.is_cuda
    images, heads = (B, H) if for_any_batch else (1, B * H)
    row_count, chunk_count = heads * tiles.shape[2], 1
    # a power of two: layers that are compiled one by one differ in their lists, and few of them in this
    while chunk_count * rows_per_chunk < row_count:
        chunk_count *= 2
    step = max(1, -(-row_count // chunk_count))
    chunks = []
    for start in range(0, row_count, step):
        rows = slice(start * images, (start + step) * images)
        chunks.append(attend(query[rows], key, value, slots[rows], bias[rows], scale, fused))
    out = torch.cat(chunks) if chunks else query
    patches = layout.merge_squares(out.view_as(tiles), tile)
    if not prefix:
        return patches
    prefix_out = dense_attention(q[:, :, :prefix], k, v, scale, fused=fused)
    return torch.cat([prefix_out, patches], 2)


def _transforms() -> bool:
    """Whether a transform of `torch.func` is active; compilers see none of them as such."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _attend(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor, bias: Tensor, scale: float, fused: bool
) -> Tensor:
    """Rows [R, m, d] attend to their slots [R, L] of the tables [S, d] with bias [R, 1, L]."""
    rows, length = slots.shape
    flat = slots.reshape(-1)
    return dense_attention(
        query.unsqueeze(0),
        key.index_select(0, flat).view(1, rows, length, -1),
        value.index_select(0, flat).view(1, rows, length, -1),
        scale,
        bias.expand(-1, query.shape[1], -1).unsqueeze(0),
        fused=fused,
    ).squeeze(0)


def _attend_recomputing(
    query: Tensor, key: Tensor, value: Tensor, slots: Tensor, bias: Tensor, scale: float, fused: bool
) -> Tensor:
    inputs = (query, key, value, slots, bias, scale, fused)
    out = checkpoint(_attend, *inputs, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(out, Tensor)
    return out
