"""The rows that `compare_speed.py` times: ten on the CPU, ten on a GPU."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

# option that names a token method -> its class in the package, and what it is given
TOKENS = "tokens"
How = Literal["eager", "compiled", "captured"]


@dataclass(frozen=True)
class ModelRow:
    """A model as a user calls it: timm's, made sparse.

    Attributes:
        model: timm's name.
        img_size: side of its images in pixels.
        options: of `sparsify`, in spellings that old commits take too; `tokens` is a class with its argument.
        batch: images in a call.
        dtype: of weights and images, as torch calls it.
        depth: number of its blocks.
        train: a call is a forward and a backward pass.
        how: called as it is, by `torch.compile`, or replayed as a CUDA graph.
    """

    model: str
    img_size: int
    options: Mapping[str, Any] = field(default_factory=dict)
    batch: int = 1
    dtype: str = "float32"
    depth: int = 12
    train: bool = False
    how: How = "eager"

    def tiny(self) -> "ModelRow":
        """The same on so small a model that only whether it runs is seen."""
        return replace(self, img_size=64, depth=2)


@dataclass(frozen=True)
class OperationRow:
    """One of the two public operations, on a square grid behind one prefix token.

    Attributes:
        operation: its name in `sparsifiner.ops`; attention takes lists that were made before.
        grid: patches along each side.
        keep: share of the tokens in each list.
        tile: side in patches of what shares a list.
        summary: side in patches of summary windows, None for none.
        batch: B of its inputs.
        heads: H of its inputs, each of 64 numbers.
        dtype: of its inputs, as torch calls it.
    """

    operation: Literal["select_topk", "sparse_attention"]
    grid: int
    keep: float = 0.1
    tile: int = 1
    summary: int | None = None
    batch: int = 1
    heads: int = 6
    dtype: str = "float32"

    def tiny(self) -> "OperationRow":
        """The same on so few tokens that only whether it runs is seen."""
        return replace(self, grid=4, tile=min(self.tile, 2))


FAST = {"preset": "fast"}
PAPER = {"preset": "paper"}
TILES = {**FAST, "keep": 0.1, "scorer": "pooled", "tile": 4, "summary": 4}
TINY, SMALL, BASE = "deit_tiny_patch16_224", "deit_small_patch16_224", "vit_base_patch16_224"

# device -> name -> row
ROWS: dict[str, dict[str, ModelRow | OperationRow]] = {
    "cpu": {
        "fast, 224 px": ModelRow(TINY, 224, FAST, batch=2),
        "fast, 512 px": ModelRow(TINY, 512, FAST, depth=6),
        "paper, 384 px": ModelRow(TINY, 384, PAPER, depth=6),
        "pooled tiles, lists for two layers": ModelRow(TINY, 384, {**TILES, "share": 2}, depth=6),
        "fast, EViT": ModelRow(TINY, 384, {**FAST, TOKENS: ("EViT", 0.7)}),
        "fast, ToMe": ModelRow(TINY, 224, {**FAST, TOKENS: ("ToMe", 8)}, batch=2),
        "fast, training step": ModelRow(TINY, 224, FAST, batch=2, depth=4, train=True),
        "paper, training step": ModelRow(TINY, 224, PAPER, depth=4, train=True),
        "select_topk": OperationRow("select_topk", 32),
        "sparse_attention": OperationRow("sparse_attention", 24),
    },
    "cuda": {
        "fast, one image": ModelRow(SMALL, 512, FAST, dtype="float16"),
        "fast, ViT-B, 1024 px": ModelRow(BASE, 1024, FAST, batch=8, dtype="bfloat16"),
        "paper, 512 px": ModelRow(SMALL, 512, PAPER, batch=8, dtype="bfloat16"),
        "pooled tiles, lists for two layers, CUDA graph": ModelRow(
            BASE, 1024, {**TILES, "share": 2}, dtype="float16", how="captured"
        ),
        "fast, EViT": ModelRow(SMALL, 1024, {**FAST, TOKENS: ("EViT", 0.7)}, batch=8, dtype="bfloat16"),
        "fast, training step": ModelRow(SMALL, 512, FAST, batch=8, dtype="bfloat16", train=True),
        "paper, training step": ModelRow(SMALL, 512, PAPER, batch=8, dtype="bfloat16", train=True),
        # compiling takes long, and longer with each block
        "fast, compiled": ModelRow(SMALL, 1024, FAST, dtype="float16", depth=4, how="compiled"),
        "select_topk": OperationRow("select_topk", 32, batch=8, dtype="bfloat16"),
        "sparse_attention": OperationRow(
            "sparse_attention", 64, tile=8, summary=8, batch=8, dtype="bfloat16"
        ),
    },
}
