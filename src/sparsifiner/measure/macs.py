"""Multiply-accumulates of a model per image: counted exactly, and by the paper's accounting.

A MAC is one multiplication and addition of a matrix product. Softmax, means, comparisons and
selection are no matrix products and count as none, as in the paper and in torch's flop counter.
Counted are the pairs that the method needs: what a backend pads at the edges of a grid that the tile
does not divide comes on top.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsifiner.attention import SparseAttention
from sparsifiner.layout import TokenLayout
from sparsifiner.patch import why_not

# The published tables' predictor MACs of the whole model, by (layers, heads, width), at 197 tokens.
# Source: fitted to tables 1 to 3 of the paper; the released defaults count to 87.1 M for DeiT-S.
_PAPER_PREDICTOR_MACS = {
    (12, 6, 384): 73.46e6,  # DeiT-S
    (16, 6, 384): 98.87e6,  # LV-ViT-S
    (20, 8, 512): 164.27e6,  # LV-ViT-M
}
_PAPER_TOKENS = 197


@dataclass(frozen=True)
class LayerMacs:
    """MACs of one attention layer per image.

    Attributes:
        dense_attention: QKᵀ and AV over all pairs.
        attention: QKᵀ and AV as configured: listed keys, summaries and the prefix rows.
        scorer: everything that the scorer multiplies.
        key_visits: listed and summary keys of a patch query, as a share of N; 1 where the layer is dense.
    """

    dense_attention: int
    attention: int
    scorer: int
    key_visits: float


@dataclass(frozen=True)
class MacReport:
    """MACs of a model per image.

    Attributes:
        tokens: N, prefix included.
        layers: attention and scorer of each layer.
        other: everything else: stem, projections, MLPs, head.
        paper_mhsa: QKᵀ, AV and predictor by the paper's accounting; None where it has none.
    """

    tokens: int
    layers: tuple[LayerMacs, ...]
    other: int
    paper_mhsa: float | None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, in the shape that `sparsifiner macs --json` prints."""
        dense_attention = sum(layer.dense_attention for layer in self.layers)
        attention = sum(layer.attention for layer in self.layers)
        scorer = sum(layer.scorer for layer in self.layers)
        return {
            "tokens": self.tokens,
            "dense": {"attention": dense_attention, "total": dense_attention + self.other},
            "sparse": {
                "attention": attention,
                "scorer": scorer,
                "total": attention + scorer + self.other,
            },
            "key_visits": sum(layer.key_visits for layer in self.layers) / len(self.layers),
            "paper": None if self.paper_mhsa is None else {"mhsa": self.paper_mhsa},
        }


def count_macs(model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224)) -> MacReport:
    """Counts the MACs of one image through a dense or sparse Vision Transformer.

    Args:
        model: a timm `VisionTransformer`, sparse or dense.
        input_size: channels, height and width of the image in pixels.

    Returns:
        The report; of a dense model `sparse` equals `dense`.

    Raises:
        ValueError: the model is not supported or does not take this input size.
    """
    reasons = why_not(model)
    if reasons:
        raise ValueError("model cannot be counted: " + "; ".join(reasons))
    assert isinstance(model, VisionTransformer)
    layout = TokenLayout(_grid_for(model, input_size), model.num_prefix_tokens)
    attentions = [block.attn for block in model.blocks]
    layers = tuple(_count_layer(attention, layout) for attention in attentions)
    other = _count_stem_and_head(model, input_size, layout) + layout.tokens * _block_weights(model)
    return MacReport(layout.tokens, layers, other, _paper_mhsa_of(attentions, layout.tokens))


def paper_mhsa(layers: int, heads: int, width: int, keep: tuple[int, int] | None) -> float | None:
    """QKᵀ, AV and predictor as the paper's tables count them, at 197 tokens.

    `L · 2 · width · ((N - 1) · k + N) + predictor` with `k = ceil(keep · N)`; dense
    `L · 2 · width · N²`.

    Args:
        layers: L.
        heads: number of heads.
        width: heads times head dim.
        keep: share of keys as an integer ratio, None for the dense model.

    Returns:
        MACs, or None for models that the tables do not have.
    """
    predictor = _PAPER_PREDICTOR_MACS.get((layers, heads, width))
    if predictor is None:
        return None
    N = _PAPER_TOKENS
    if keep is None:
        return float(layers * 2 * width * N * N)
    keys = -(-keep[0] * N // keep[1])
    return layers * 2 * width * ((N - 1) * keys + N) + predictor


def _paper_mhsa_of(attentions: list[Any], tokens: int) -> float | None:
    first = attentions[0]
    shape = (len(attentions), first.num_heads, first.num_heads * first.head_dim)
    if tokens != _PAPER_TOKENS:
        return None
    if not isinstance(first, SparseAttention):
        return paper_mhsa(*shape, keep=None)
    config = first.config
    if (config.scorer, config.tile, config.summary, config.share) != ("lowrank", 1, None, 1):
        return None
    if tokens < config.min_tokens:
        return None
    keeps = {attention.keep for attention in attentions}
    return paper_mhsa(*shape, keep=keeps.pop()) if len(keeps) == 1 else None


def _count_layer(attention: Any, layout: TokenLayout) -> LayerMacs:
    N = layout.tokens
    per_pair = 2 * attention.num_heads * attention.head_dim
    dense = per_pair * N * N
    spec = attention.list_spec(layout) if isinstance(attention, SparseAttention) else None
    if spec is None:
        return LayerMacs(dense, dense, 0, 1.0)
    summary = attention.summary_side(layout)
    windows = 0 if summary is None else layout.squares(summary)
    keys = spec.budget + windows
    pairs = layout.patches * keys + layout.prefix * N
    scorer = attention.scorer.macs(spec, attention.num_heads, attention.head_dim)
    return LayerMacs(dense, per_pair * pairs, scorer, keys / N)


def _block_weights(model: VisionTransformer) -> int:
    """Weights of all linear layers in the blocks that every token meets once."""
    return sum(
        module.weight.numel()
        for name, module in model.blocks.named_modules()
        if isinstance(module, nn.Linear) and ".scorer." not in name
    )


def _count_stem_and_head(
    model: VisionTransformer, input_size: tuple[int, int, int], layout: TokenLayout
) -> int:
    """Stem and head differ from model to model, so torch counts them, on a copy without data."""
    shapes = {
        id(tensor): torch.empty_like(tensor, device="meta")
        for tensor in (*model.parameters(), *model.buffers())
    }
    shape_model = copy.deepcopy(model, shapes).eval().requires_grad_(False)
    dtype = next(model.parameters()).dtype
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        shape_model.patch_embed(torch.empty(1, *input_size, dtype=dtype, device="meta"))
        shape_model.forward_head(torch.empty(1, layout.tokens, model.embed_dim, dtype=dtype, device="meta"))
    flops: int = counter.get_total_flops()
    return flops // 2


def _grid_for(model: VisionTransformer, input_size: tuple[int, int, int]) -> tuple[int, int]:
    height, width = input_size[1:]
    if model.dynamic_img_size:
        rows, columns = model.patch_embed.dynamic_feat_size((height, width))
        return int(rows), int(columns)
    expected = tuple(model.patch_embed.img_size)
    if (height, width) != expected:
        raise ValueError(
            f"input_size={input_size} does not fit the model, which takes {expected[0]}x{expected[1]} "
            "images; call model.set_input_size((height, width)) first, or create it with img_size="
        )
    rows, columns = model.patch_embed.grid_size
    return int(rows), int(columns)
