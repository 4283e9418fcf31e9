"""What a layer does for one kind of call: planned once, looked up from then on."""

import functools
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from sparsifiner.config import SparsifyConfig
from sparsifiner.geometry.connectivity import forced_prefix, key_budget
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.geometry.layout import Layout
from sparsifiner.ratios import exact_ratio
from sparsifiner.scorers import ListSpec, Place

# plans that are remembered: layers of some models, at some image sizes, while budgets are tried
_REMEMBERED = 65_536


@dataclass(frozen=True)
class Call:
    """One kind of call: all that a plan may depend on besides the configuration and the layer.

    Today's plans look at the layouts alone.

    Attributes:
        layout: where the tokens lie.
        whole: where all tokens of the image lie, if some were dropped: lists are as long as for all of them.
        heads: number of heads; None where nobody asks for a certain call, likewise below.
        head_dim: d.
        device: kind of device, such as "cuda".
        dtype: of q, k and v.
        batch_class: batch size, rounded up to a power of two.
        compiled: whether the call is compiled.
    """

    layout: Layout
    whole: TokenLayout | None = None
    heads: int | None = None
    head_dim: int | None = None
    device: str | None = None
    dtype: torch.dtype | None = None
    batch_class: int | None = None
    compiled: bool = False

    @classmethod
    def of(cls, q: Tensor, layout: Layout, whole: TokenLayout | None) -> Self:
        """The kind of a call with queries [B, H, N, d]."""
        if torch.compiler.is_compiling():  # compiled code is for any batch
            return cls(layout, whole, compiled=True)
        B, H, _, d = q.shape
        return cls(layout, whole, H, d, q.device.type, q.dtype, batch_class(B))


def batch_class(batch: int) -> int:
    """A batch size, rounded up to a power of two."""
    return 1 << (batch - 1).bit_length()


@functools.lru_cache(_REMEMBERED)
def plan(call: Call, config: SparsifyConfig, layer: Place) -> ListSpec | None:
    """The lists that a layer wants in a call, or None where it is dense attention.

    It depends on nothing but its arguments.

    Args:
        call: the kind of call.
        config: what the model is asked to do.
        layer: which layer it is.
    """
    return lists_at(call, config, keep_at(call, config, layer), layer.scale)


def keep_at(call: Call, config: SparsifyConfig, layer: Place) -> tuple[int, int]:
    """Share of the keys that a layer lists, as an `exact_ratio`."""
    whole = call.whole or call.layout
    return exact_ratio(_keep_of(config, layer.index, layer.depth, whole.patches, whole.prefix))


def lists_at(call: Call, config: SparsifyConfig, keep: tuple[int, int], scale: float) -> ListSpec | None:
    """The lists of a layer that keeps this share of the keys, or None where it is dense attention.

    A layer is dense attention where its lists and summaries would be no shorter than all keys, and below
    `min_tokens`.

    Args:
        call: the kind of call.
        config: what the model is asked to do, `keep` aside.
        keep: as an `exact_ratio`.
        scale: factor of the logits.
    """
    layout, whole = call.layout, call.whole or call.layout
    forced = forced_prefix(layout.prefix, config.tile, config.summary)
    budget = min(layout.tokens, _key_budget(keep, whole.tokens, forced))
    summary = layout.auto_summary() if config.summary == "auto" else config.summary
    visits = budget + (0 if summary is None else layout.squares(summary))
    if layout.tokens < config.min_tokens or visits >= layout.tokens:
        return None
    return ListSpec(layout, config.tile, budget, forced, scale, backend_of(config), summary)


def backend_of(config: SparsifyConfig) -> str:
    """Backend of both operations."""
    return config.scorer.backend(config.backend)


def _keep_of(config: SparsifyConfig, layer: int, depth: int, patches: int, prefix: int) -> float:
    queries = None
    if config.tokens is not None:  # how many queries each layer has depends on the image size
        queries = [count.attention for count in config.tokens.counts(depth, patches, prefix)]
    return config.keep_of(layer, depth, queries)


def _key_budget(keep: tuple[int, int], tokens: int, forced: int) -> int:
    if not torch.compiler.is_compiling():
        return key_budget(keep, tokens, forced)
    # layers that are compiled one by one differ in this number: it becomes a variable with the second
    with torch._dynamo.patch_dynamo_config(allow_unspec_int_on_nn_module=True):
        return key_budget(keep, tokens, forced)
