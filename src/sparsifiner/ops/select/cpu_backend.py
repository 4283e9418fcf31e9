"""Selection by the native library: one call of its C functions."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsifiner.geometry.grid import TokenLayout, layout_of
from sparsifiner.ops import native
from sparsifiner.ops.arguments import LowRankArguments


def select_topk(scores: Tensor, budget: int, forced: int, own: Tensor) -> Tensor:
    """See `sparsifiner.ops.select_topk`; rules for special scores, forced and own tokens in the same pass."""
    scores = scores.float().contiguous()
    indices, lists, own = _lists(scores.shape, scores.shape[-1], budget, forced, own)
    native.call("select_topk", lists, native.address_of("scores", scores, torch.float32, *scores.shape))
    return indices


def lowrank_coefficients(
    q: Tensor,
    k: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    down: Tensor,
    temperature: float,
) -> Tensor:
    """C, all K coefficients of every row, accumulated in fp32.

    Args:
        q: [B, H, rows, d] the rows' queries, fp32 or bf16, d a multiple of 16; rows must be contiguous.
        k: [B, H, N, d] keys, likewise; their dtype may be another.
        query_weight: W_q [c, d].
        query_bias: b_q [c].
        key_weight: W_k [c, d].
        key_bias: b_k [c].
        down: W_down [N, K].
        temperature: factor of the coefficients' logits.

    Returns:
        fp32 [B, H, rows, K].
    """
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    B, H, rows, d = q.shape
    N, K = down.shape
    coefficients = torch.empty(B, H, rows, K, dtype=torch.float32, device="cpu")
    if not coefficients.numel():
        return coefficients
    c = query_weight.shape[0]
    given = (
        ("down", down, (N, K)),
        ("query_weight", query_weight, (c, d)),
        ("query_bias", query_bias, (c,)),
        ("key_weight", key_weight, (c, d)),
        ("key_bias", key_bias, (c,)),
    )
    # held until the call has ended
    weights = [(name, weight.float().contiguous(), shape) for name, weight, shape in given]
    predictor = native.Predictor(
        native.tensor_of("q", q, q.dtype, B, H, rows, d),
        native.tensor_of("k", k, k.dtype, B, H, N, d),
        *(native.DTYPES[q.dtype], native.DTYPES[k.dtype], B, H, rows, N, d, K, c),
        *(native.address_of(name, weight, torch.float32, *shape) for name, weight, shape in weights),
        *(coefficients.data_ptr(), temperature),
    )
    native.call("coefficients", predictor)
    return coefficients


def predict_lists(*arguments: Any) -> Tensor:
    """Lists of the low-rank predictor's scores.

    Args:
        *arguments: `LowRankArguments`; q and k fp32 or bf16, d a multiple of 16.

    Returns:
        int32 [B, H, rows, budget], ascending, -1 last.
    """
    given = LowRankArguments(*arguments)
    layout, tile = layout_of(given.geometry), given.geometry[3]
    query = given.q[:, :, layout.prefix :]
    if tile > 1:
        query = layout.square_means(query.float(), tile)
    weights = (given.query_weight, given.query_bias, given.key_weight, given.key_bias, given.down)
    coefficients = lowrank_coefficients(query, given.k, *weights, given.temperature)
    sizes = (given.coef_topk, given.budget, given.forced)
    return select_lowrank(coefficients, given.basis, *sizes, _own_tokens(layout, tile))


def select_impact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: Sequence[int],
    scale: float,
    budget: int,
    forced: int,
) -> tuple[Tensor, Tensor]:
    """Lists by the scores of `sparsifiner.scorers.ImpactScorer`, computed in fp32.

    Args:
        q: [B, H, N, d] queries, fp32 or bf16, d a multiple of 16.
        k: [B, H, N, d] keys.
        v: [B, H, N, d] values.
        geometry: of the layout, with the sides in patches of a tile, of the squares whose mean queries score,
            and of a window.
        scale: factor of the logits.
        budget: list length.
        forced: the first keys, in every list.

    Returns:
        int32 [B, H, rows, budget], ascending, -1 last; and the means of no window, which native attention
        computes itself.
    """
    layout, (tile, pool, summary) = layout_of(geometry), geometry[3:]
    means = k.new_empty(2, *k.shape[:2], 0, k.shape[-1])
    B, H, N, d = q.shape
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    own = _own_tokens(layout, tile)
    indices, lists, own = _lists(torch.Size((B, H, len(own))), N, budget, forced, own)
    if not indices.numel():
        return indices, means
    square_tokens, windows = _own_tokens(layout, pool), _own_tokens(layout, summary)
    tile_squares = _tile_squares(layout, tile, pool)
    named = {"q": q, "k": k, "v": v}
    impact = native.Impact(
        *(native.tensor_of(name, x, q.dtype, B, H, layout.tokens, d) for name, x in named.items()),
        *(native.DTYPES[q.dtype], scale, B, H, N, d, layout.prefix),
        *(*square_tokens.shape, square_tokens.data_ptr(), tile_squares.shape[1], tile_squares.data_ptr()),
        *(*windows.shape, windows.data_ptr()),
    )
    native.call("select_impact", lists, impact)
    return indices, means


@functools.lru_cache(maxsize=64)
def _tile_squares(layout: TokenLayout, tile: int, pool: int) -> Tensor:
    return layout.squares_of_tiles(tile, pool, torch.device("cpu")).int().contiguous()


@functools.lru_cache(maxsize=64)
def _own_tokens(layout: TokenLayout, tile: int) -> Tensor:
    return layout.square_tokens(tile, torch.device("cpu")).int().contiguous()


def select_lowrank(
    coefficients: Tensor, basis: Tensor, kept: int, budget: int, forced: int, own: Tensor
) -> Tensor:
    """Lists of the scores C̃ Ũᵀ, which never reach memory.

    Args:
        coefficients: C, fp32 [B, H, rows, K].
        basis: Ũᵀ, fp32 [K, N].
        kept: coefficients of a row that count, the largest.
        budget: list length k.
        forced: the first keys, in every list.
        own: integer [rows, m], as for `select_topk`.

    Returns:
        int32 [B, H, rows, k], ascending, -1 last.
    """
    if not 1 <= kept <= basis.shape[0] == coefficients.shape[-1]:
        raise ValueError(
            f"select_lowrank: {kept} of {coefficients.shape[-1]} coefficients do not go with a basis of "
            f"{basis.shape[0]} rows; give 1 up to as many as there are"
        )
    coefficients, basis = coefficients.float().contiguous(), basis.float().contiguous()
    indices, lists, own = _lists(coefficients.shape, basis.shape[1], budget, forced, own)
    native.call(
        *("select_lowrank", lists),
        native.address_of("coefficients", coefficients, torch.float32, *coefficients.shape),
        native.address_of("basis", basis, torch.float32, *basis.shape),
        *(basis.shape[0], kept),
    )
    return indices


def _lists(
    shape: torch.Size, tokens: int, budget: int, forced: int, own: Tensor
) -> tuple[Tensor, native.Lists, Tensor]:
    """Empty lists for rows [B, H, rows], as torch and as C know them, and `own` as C reads it.

    Raises:
        ValueError: the sizes do not go together.
    """
    B, H, rows = shape[:3]
    if not 0 <= forced <= budget <= tokens:
        raise ValueError(f"native kernels: need forced={forced} <= budget={budget} <= tokens={tokens}")
    indices = torch.empty(B, H, rows, budget, dtype=torch.int32, device="cpu")
    own = own.int().contiguous()
    sizes = (B * H * rows, rows, tokens, budget, forced, own.shape[1])
    own_address = native.address_of("own", own, torch.int32, rows, own.shape[1])
    return indices, native.Lists(*sizes, own_address, indices.data_ptr()), own
