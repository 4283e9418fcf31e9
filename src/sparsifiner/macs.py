"""Multiply-accumulates of a model per image, counted exactly.

A MAC is one multiplication and addition of a matrix product. Softmax, means, comparisons and
selection are no matrix products and count as none, as in the paper and in torch's flop counter.
Counted are the pairs that the method needs: what a backend pads at the edges of a grid that the tile
does not divide comes on top.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsifiner.attention import SparseAttention
from sparsifiner.blocks import TokenBlocks
from sparsifiner.geometry.curve import CurveLayout
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.hosts import Host, host_of, reasons_against
from sparsifiner.models.linformer import LinformerAttention
from sparsifiner.plan import Call, plan
from sparsifiner.published import paper_mhsa_of
from sparsifiner.tokens import Counts


@dataclass(frozen=True)
class LayerMacs:
    """MACs of one attention layer per image.

    Attributes:
        dense_attention: QKᵀ and AV over all pairs.
        attention: QKᵀ and AV as configured: listed keys, summaries and the prefix rows.
        scorer: everything that the scorer multiplies; of Linformer the mixtures.
        key_visits: listed and summary keys of all patch queries, as a share of the pairs of the dense layer.
        tokens: those that its attention sees, prefix included.
        token_choice: what is multiplied to choose the tokens that stay.
    """

    dense_attention: int
    attention: int
    scorer: int
    key_visits: float
    tokens: int
    token_choice: int = 0


@dataclass(frozen=True)
class MacReport:
    """MACs of a model per image.

    Attributes:
        tokens: N of the whole image, prefix included.
        layers: attention and scorer of each layer.
        dense_other: everything else of the dense model: stem, projections, MLPs, head.
        other: the same for the tokens that are left.
        paper_mhsa: QKᵀ, AV and predictor by the paper's accounting; None where it has none.
    """

    tokens: int
    layers: tuple[LayerMacs, ...]
    dense_other: int
    other: int
    paper_mhsa: float | None

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, in the shape that `sparsifiner macs --json` prints."""
        dense_attention = sum(layer.dense_attention for layer in self.layers)
        attention = sum(layer.attention for layer in self.layers)
        scorer = sum(layer.scorer for layer in self.layers)
        choice = sum(layer.token_choice for layer in self.layers)
        sparse = {"attention": attention, "scorer": scorer}
        if choice:
            sparse["token_choice"] = choice
        return {
            "tokens": self.tokens,
            "dense": {"attention": dense_attention, "total": dense_attention + self.dense_other},
            "sparse": {**sparse, "total": attention + scorer + choice + self.other},
            "key_visits": sum(layer.key_visits for layer in self.layers) / len(self.layers),
            "paper": None if self.paper_mhsa is None else {"mhsa": self.paper_mhsa},
        }


def count_macs(model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224)) -> MacReport:
    """Counts the MACs of one image through a dense or sparse Vision Transformer.

    Args:
        model: a model of a family in `sparsifiner.hosts`, sparse or dense.
        input_size: channels, height and width of the image in pixels.

    Returns:
        The report; of a dense model `sparse` equals `dense`.

    Raises:
        ValueError: the model is not supported or does not take this input size.
    """
    reasons = reasons_against(model, (LinformerAttention,))
    if reasons:
        raise ValueError("model cannot be counted: " + "; ".join(reasons))
    host = host_of(model)
    layout = host.layout_for(input_size[1:])
    attentions = host.attentions
    method = host.blocks.method if isinstance(host.blocks, TokenBlocks) else None
    everything = Counts(layout.tokens, layout.tokens)
    counts = [everything] * len(attentions)
    if method is not None:
        # of the depth at which it was made sparse, also if layers at the end were pruned since
        depth = attentions[0].place.depth
        counts = method.counts(depth, layout.patches, layout.prefix)[: len(attentions)]
    counted = list(zip(host.blocks, counts, strict=True))
    layers = tuple(_count_layer(host, block, layout, count) for block, count in counted)
    blocks = sum(_count_linears(host, block, count) for block, count in counted)
    dense_blocks = sum(_count_linears(host, block, everything) for block in host.blocks)
    left = counts[-1].mlp
    other = _count_stem_and_head(host, input_size, left) + blocks
    dense_other = _count_stem_and_head(host, input_size, layout.tokens) + dense_blocks
    return MacReport(layout.tokens, layers, dense_other, other, paper_mhsa_of(host, counts, method))


def _count_layer(host: Host, block: Any, layout: TokenLayout, count: Counts) -> LayerMacs:
    attention, N, n = host.attention_of(block), layout.tokens, count.attention
    num_heads, head_dim = host.heads_of(attention)
    per_pair = 2 * num_heads * head_dim
    dense = per_pair * N * N
    patches = n - layout.prefix - count.fused
    whole = patches == layout.patches
    now = layout if whole else CurveLayout(patches, layout.prefix + count.fused)
    choice = 0
    if count.gone and getattr(block, "reducer", None) is not None:
        choice = block.reducer.macs(count, layout.prefix, num_heads * head_dim, head_dim)
    if isinstance(attention, LinformerAttention):
        attending, mixing, keys = attention.macs(layout)
        return LayerMacs(dense, attending, mixing, keys / N, N)
    spec = None
    if isinstance(attention, SparseAttention):
        spec = plan(Call(now, None if whole else layout), attention.config, attention.place)
    if spec is None:
        return LayerMacs(dense, per_pair * n * n, 0, now.patches * n / (layout.patches * N), n, choice)
    windows = 0 if spec.summary is None else now.squares(spec.summary)
    keys = spec.budget + windows
    pairs = now.patches * keys + now.prefix * n
    scorer = attention.scorer.macs(spec, num_heads, head_dim)
    visits = now.patches * keys / (layout.patches * N)
    return LayerMacs(dense, per_pair * pairs, scorer, visits, n, choice)


def _count_linears(host: Host, block: nn.Module, count: Counts) -> int:
    """Linear layers of a block that every token meets once."""
    macs, in_attention = 0, f"{host.ATTENTION}."
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) and ".scorer." not in name and not name.startswith("reducer."):
            tokens = count.attention if name.startswith(in_attention) else count.mlp
            macs += module.weight.numel() * tokens
    return macs


def _count_stem_and_head(host: Host, input_size: tuple[int, int, int], tokens: int) -> int:
    """Stem and head differ from model to model, so torch counts them, on a copy without data."""
    model = host.model
    shapes = {
        id(tensor): torch.empty_like(tensor, device="meta")
        for tensor in (*model.parameters(), *model.buffers())
    }
    shape_host = host_of(copy.deepcopy(model, shapes).eval().requires_grad_(False))
    dtype = next(model.parameters()).dtype
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        shape_host.embed(torch.empty(1, *input_size, dtype=dtype, device="meta"))
        shape_host.logits(torch.empty(1, tokens, host.width, dtype=dtype, device="meta"))
    flops: int = counter.get_total_flops()
    return flops // 2
