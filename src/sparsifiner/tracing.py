"""Opt-in recording of what every layer attended to."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

from sparsifiner.attention import SparseAttention, dense_connectivity, split_heads
from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.layout import Side
from sparsifiner.patch import sparse_layers


@dataclass(frozen=True)
class LayerTrace:
    """What one layer did in the last forward.

    Attributes:
        connectivity: its key lists; lists of all keys where the layer stayed dense.
        summary: side of its summary windows, or the run that one is where patches are gone and "auto" chose;
            None for none.
        dense: whether it stayed dense.
        positions: int64 [B, n], place in the image of each patch that the layer saw, as a raster index, where
            some were dropped before; None where it saw all.
    """

    connectivity: Connectivity
    summary: Side | None
    dense: bool
    positions: Tensor | None = None


@contextmanager
def trace(model: nn.Module) -> Iterator[dict[int, LayerTrace]]:
    """Records the key lists of every layer while the context is open; compiled models run eagerly in it.

    Args:
        model: a sparse model.

    Yields:
        A mapping from layer index to the `LayerTrace` of the last forward.

    Example:
        >>> with sparsifiner.trace(model) as t:
        ...     model(images)
        >>> t[3].connectivity.indices  # int32 [B, H, rows, k]
    """
    traces: dict[int, LayerTrace] = {}
    handles = []
    for layer in sparse_layers(model):
        handles.append(layer.register_forward_pre_hook(_forget(traces, layer)))
        handles.append(layer.scorer.register_forward_hook(_record_lists(traces, layer)))
        handles.append(layer.register_forward_hook(_record_rest(traces, layer), with_kwargs=True))
    try:
        # compiled code does not see hooks that come after it
        with torch.compiler.set_stance("force_eager"):
            yield traces
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def trace_projections(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Records the queries and keys of every attention layer, dense or sparse, while the context is open.

    They are those of the last forward, detached; compiled models run eagerly in it.

    Args:
        model: a timm Vision Transformer.

    Yields:
        A list that every forward fills anew with q and k, each [B, H, N, d], layer by layer.
    """
    layers = [module for module in model.modules() if isinstance(module, Attention | SparseAttention)]
    projections: list[tuple[Tensor, Tensor]] = []
    handles = [layer.qkv.register_forward_hook(_record_projections(projections, layer)) for layer in layers]
    handles.insert(0, layers[0].qkv.register_forward_pre_hook(lambda module, args: projections.clear()))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield projections
    finally:
        for handle in handles:
            handle.remove()


def _record_projections(projections: list[tuple[Tensor, Tensor]], layer: Attention | SparseAttention) -> Any:
    def hook(module: nn.Module, args: Any, qkv: Tensor) -> None:
        with torch.no_grad():
            q, k, _ = split_heads(layer, qkv)
        projections.append((q, k))

    return hook


def _forget(traces: dict[int, LayerTrace], layer: SparseAttention) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        traces.pop(layer.layer, None)

    return hook


def _record_lists(traces: dict[int, LayerTrace], layer: SparseAttention) -> Any:
    def hook(module: nn.Module, args: Any, connectivity: Connectivity) -> None:
        # kernels that read the lists as they are must not get them back: whoever has them may change them
        of_caller = replace(connectivity.alone(), check=False, selected=False)
        traces[layer.layer] = LayerTrace(of_caller, args[3].summary, dense=False)

    return hook


def _record_rest(traces: dict[int, LayerTrace], layer: SparseAttention) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        state = kwargs.get("state")
        if layer.layer not in traces:
            layout = layer.current_layout(args[0].shape[1]) if state is None else state.layout
            lists = dense_connectivity(len(args[0]), layer.num_heads, layout, layer.config.tile, args[0])
            traces[layer.layer] = LayerTrace(lists, None, dense=True)
        if state is not None:
            traces[layer.layer] = replace(traces[layer.layer], positions=state.positions)

    return hook
