"""Sparse attention by the native library: one call of its C function."""

import functools
from typing import Any

import torch
from torch import Tensor

from sparsifiner.geometry.grid import TokenLayout, layout_of
from sparsifiner.ops import native
from sparsifiner.ops.arguments import AttendArguments


def attend(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same function as the reference, forward only, for fp32 and bf16.

    Keys and values of a few heads at a time are copied to fp32 rows with the summaries behind them.
    Tiles of queries share one gathered list, single queries have their own; threads take them in turns.

    Args:
        *arguments: `AttendArguments`, fp32 or bf16, d a multiple of 16. Means are computed all the same.

    Returns:
        [B, H, N, d] in the dtype of `q`, and three times nothing.

    Raises:
        ValueError: gradients are wanted, which the library has none of.
    """
    q, k, v, indices, _, _, geometry, scale, training = AttendArguments(*arguments)
    if training:
        raise ValueError("sparse_attention: backend='cpu' has no gradients; use backend='torch'")
    nothing = (q.new_empty(0), q.new_empty(0), q.new_empty(0))
    layout, (tile, summary) = layout_of(geometry), geometry[3:]
    B, H, N, d = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    indices = indices.contiguous()
    out = torch.empty(B, N, H, d, dtype=q.dtype, device="cpu").transpose(1, 2)
    if not out.numel():
        return out, *nothing
    tile_tokens, window_tokens, window_of = _tables(layout, tile, summary)
    shape, tiles, keys = (B, H, layout.tokens, d), len(tile_tokens), indices.shape[-1]
    named = {"q": q, "k": k, "v": v, "out": out}
    attention = native.Attention(
        *(native.tensor_of(name, x, q.dtype, *shape) for name, x in named.items()),
        *(native.DTYPES[q.dtype], scale, *shape, layout.prefix),
        *(*tile_tokens.shape, tile_tokens.data_ptr()),
        *(keys, native.address_of("indices", indices, torch.int32, B, H, tiles, keys)),
        *(*window_tokens.shape, window_tokens.data_ptr(), window_of.data_ptr()),
    )
    native.call("attend", attention)
    return out, *nothing


@functools.lru_cache(maxsize=64)
def _tables(layout: TokenLayout, tile: int, summary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of each tile and of each window, and the window of each token, -1 for none: all int32."""
    cpu = torch.device("cpu")
    tile_tokens = layout.square_tokens(tile, cpu).int().contiguous()
    if not summary:
        none = torch.empty(0, 0, dtype=torch.int32, device=cpu)
        return tile_tokens, none, none
    token = torch.arange(layout.tokens, device=cpu)
    window_of = torch.where(token < layout.prefix, -1, layout.square_of_token(token, summary))
    return tile_tokens, layout.square_tokens(summary, cpu).int().contiguous(), window_of.int()
