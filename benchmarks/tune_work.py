"""The work by which each value of tuned.py and csrc/tuned.h is measured, beside which others."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor

import sparsifiner
from sparsifiner.geometry.connectivity import Connectivity, key_budget
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.ops import select_topk, sparse_attention
from sparsifiner.ops.dense import dense_attention
from sparsifiner.ops.select.operators import select_impact, select_pooled
from sparsifiner.tokens.sizes import log_sizes, prefers_bias, weigh_by_size
from sparsifiner.tokens.state import best_of

Work = Callable[[], object]
HEADS, HEAD_DIM, SCALE = 6, 64, 64**-0.5
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Size:
    """A value of which more or less is possible.

    Attributes:
        device: where it counts, "cpu" or "cuda".
        others: what it is measured against.
        make: makes the work.
    """

    device: str
    others: tuple[object, ...]
    make: Callable[[], Work]


@dataclass(frozen=True)
class Threshold:
    """A size up to which one of two ways is taken.

    Attributes:
        device: where it counts.
        sizes: at which both ways are measured.
        make: makes the work of a size.
    """

    device: str
    sizes: tuple[int, ...]
    make: Callable[[int], Work]


def qkv(layout: TokenLayout, batch: int, device: str, dtype: torch.dtype, head_dim: int = HEAD_DIM) -> Tensor:
    """Views [3, B, H, N, d] of one projection, as attention layers make them."""
    made = torch.randn(batch, layout.tokens, 3, HEADS, head_dim, device=device, dtype=dtype)
    return made.permute(2, 0, 3, 1, 4)


def attention(
    side: int,
    *,
    batch: int = 1,
    device: str = "cpu",
    dtype: torch.dtype = FP32,
    tile: int = 8,
    summary: int | None = 8,
    prefix: int = 1,
    keep: tuple[int, int] = (1, 10),
    backend: str = "auto",
    head_dim: int = HEAD_DIM,
) -> Work:
    """Attention of a side x side grid over lists that the package selected from random scores."""
    layout = TokenLayout((side, side), prefix)
    q, k, v = qkv(layout, batch, device, dtype, head_dim)
    scores = torch.rand(batch, HEADS, layout.squares(tile), layout.tokens, device=device)
    budget = key_budget(keep, layout.tokens, prefix)
    own = layout.square_tokens(tile, q.device)
    lists = Connectivity.over(
        layout, select_topk(scores, budget, forced=prefix, own=own), tile, selected=True
    )
    return inference(lambda: sparse_attention(q, k, v, lists, summary, backend=backend))


def inference(call: Work) -> Work:
    def work() -> object:
        with torch.inference_mode():
            return call()

    return work


def layer(side: int, batch: int, device: str, dtype: torch.dtype, scorer: str, tile: int) -> Work:
    """One block of DeiT-S, whose scores torch's operations make."""
    model = timm.create_model("deit_small_patch16_224", img_size=16 * side, depth=1).eval()
    options: dict[str, Any] = {"keep": 0.1, "tile": tile, "summary": None, "scorer": scorer}
    block = sparsifiner.sparsify(model, **options).blocks[0].to(device, dtype)
    x = torch.randn(batch, side * side + 1, 384, device=device, dtype=dtype)
    return inference(lambda: block(x))


def sorted_scores(count: int) -> Work:
    scores = torch.rand(8, count)
    return lambda: best_of(scores, count // 2, "auto")


def sized_attention(tokens: int) -> Work:
    """Dense attention to tokens that stand for several, by a bias or by wider heads."""
    q, k, v = torch.randn(3, 32, HEADS, tokens, HEAD_DIM, device="cuda", dtype=BF16)
    sizes = torch.randint(1, 9, (32, tokens), device="cuda").to(BF16)

    def work() -> object:
        if prefers_bias(q):
            return dense_attention(q, k, v, SCALE, log_sizes(sizes, q.dtype)[:, None, None])
        return dense_attention(*weigh_by_size(q, k, v, sizes, SCALE), SCALE)

    return inference(work)


def masked(tokens: int) -> Work:
    side = int(tokens**0.5)
    return attention(
        side, batch=16, device="cuda", dtype=BF16, tile=1, summary=None, prefix=0, backend="torch"
    )


def pooled_lists(dtype: torch.dtype, batch: int = 8) -> Work:
    """Selection by the products with tiles' mean queries, N = 4096."""
    q, k, _ = qkv(TokenLayout((64, 64)), batch, "cuda", dtype)
    return inference(lambda: select_pooled(q, k, (64, 64, 0, 8), 410, 0, "triton"))


def impact_lists() -> Work:
    """Selection by impact, 16 squares in a tile, N = 4096."""
    q, k, v = qkv(TokenLayout((64, 64)), 8, "cuda", BF16)
    return inference(lambda: select_impact(q, k, v, (64, 64, 0, 16, 4, 8), SCALE, 410, 0, "triton"))


def coefficients() -> Work:
    """Coefficients of the low-rank predictor as the paper has it, N = 1025."""
    from sparsifiner.ops.select.triton_lowrank import lowrank_coefficients  # noqa: PLC0415, Triton's kernels

    layout, reduced, basis = TokenLayout((32, 32), 1), 32, 32
    q, k, _ = qkv(layout, 32, "cuda", BF16)
    shapes = (
        *((reduced, HEAD_DIM), (reduced,), (reduced, HEAD_DIM), (reduced,)),
        *((layout.tokens, basis), (basis, layout.tokens)),
    )
    weights = [torch.randn(shape, device="cuda") for shape in shapes[:-1]]
    sizes = {"geometry": layout.for_kernels(1), "temperature": SCALE}
    return inference(lambda: lowrank_coefficients(q, k, *weights, **sizes))


def window_means() -> Work:
    from sparsifiner.ops.program import operation  # noqa: PLC0415, Triton's kernels
    from sparsifiner.ops.triton_means import square_means  # noqa: PLC0415

    layout = TokenLayout((64, 64))
    _, k, v = qkv(layout, 8, "cuda", BF16)
    means = operation(lambda draft, k, v: (square_means(draft, k, layout, 8, v),))
    return inference(lambda: means(k, v))


def short_rows() -> Work:
    scores = torch.rand(128, HEADS, 196, 196, device="cuda")
    return inference(lambda: select_topk(scores, 20, backend="triton"))


def gpu_attention(
    dtype: torch.dtype = BF16, head_dim: int = HEAD_DIM, prefix: int = 0, tile: int = 8
) -> Work:
    return attention(
        64, batch=8, device="cuda", dtype=dtype, head_dim=head_dim, prefix=prefix, tile=tile, backend="triton"
    )


SIZES = {
    "SCORE_CHUNK[cpu]": Size(
        "cpu", (2**16, 2**17, 2**19, 2**20), lambda: layer(32, 1, "cpu", FP32, "oracle", 1)
    ),
    "GATHERED_BYTES[cpu]": Size(
        "cpu", tuple(count * 2**20 for count in (1, 2, 8, 16)), lambda: attention(32, backend="torch")
    ),
    "SCORE_CHUNK[cuda]": Size("cuda", (2**22, 2**24, 2**28), lambda: layer(64, 4, "cuda", BF16, "oracle", 1)),
    "GATHERED_BYTES[cuda]": Size(
        "cuda",
        tuple(count * 2**20 for count in (16, 64, 1024)),
        lambda: attention(64, batch=8, device="cuda", dtype=BF16, backend="torch"),
    ),
    "SCORE_BYTES": Size("cuda", (2**20, 3 * 2**20, 12 * 2**20), lambda: pooled_lists(BF16, batch=1)),
    "TILE_SCORES[1]": Size("cuda", ((32, 128), (64, 64), (64, 256), (128, 128)), lambda: pooled_lists(BF16)),
    "TILE_SCORES[16]": Size("cuda", ((64, 128), (64, 256), (128, 128)), impact_lists),
    "TILE_SCORES_FP32": Size("cuda", ((16, 64), (32, 32), (64, 64)), lambda: pooled_lists(FP32)),
    "SHARED_SCORES": Size("cuda", (256, 512, 2048), short_rows),
    "SUMMED_KEYS": Size("cuda", (128, 256, 1024), coefficients),
    "COEFFICIENT_ROWS": Size("cuda", (32, 128), coefficients),
    "ATTEND_QUERIES": Size("cuda", (16, 32), gpu_attention),
    "ATTEND_QUERIES_FP32": Size("cuda", ((16, 16), (64, 16)), lambda: gpu_attention(FP32)),
    "ATTEND_KEYS": Size("cuda", (32, 128), gpu_attention),
    "ATTEND_KEYS_FP32": Size("cuda", (16, 64), lambda: gpu_attention(FP32)),
    "ATTEND_REGISTERS": Size("cuda", (96, 168, 255), gpu_attention),
    "PREFIX_KEYS": Size("cuda", (128, 256, 1024), lambda: gpu_attention(prefix=1)),
    "MEAN_ELEMENTS": Size("cuda", (1024, 2048, 8192), window_means),
}
THRESHOLDS = {
    "SORTED_SCORES": Threshold("cpu", (196, 384, 512, 768, 1024), sorted_scores),
    "MASKED_TOKENS": Threshold("cuda", (576, 1024, 1600, 2304), masked),
    "BIASED_TOKENS": Threshold("cuda", (256, 576, 1024, 1600, 2304, 4096), sized_attention),
}
# values of csrc/tuned.h -> others
NATIVE = {
    "ATTEND_BYTES": ("2 << 20", "32 << 20"),
    "IMPACT_BYTES": ("2 << 20", "32 << 20"),
    "TILE_QUERIES": ("32", "128"),
    "QUERY_BLOCK": ("4", "32"),
    "ROWS_AT_ONCE": ("8", "128"),
}


def native_work(name: str) -> Work:
    """The work of a value of csrc/tuned.h."""
    if name == "IMPACT_BYTES":
        return layer(32, 4, "cpu", FP32, "impact", tile=8)
    if name == "ROWS_AT_ONCE":
        scores = torch.rand(1, HEADS, 1024, 1024)
        return inference(lambda: select_topk(scores, 103, backend="cpu"))
    if name == "QUERY_BLOCK":
        return attention(32, tile=1, summary=None, backend="cpu")
    return attention(32, batch=4, tile=16 if name == "TILE_QUERIES" else 8, backend="cpu")
