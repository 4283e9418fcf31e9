"""Opt-in recording of what every layer attended to."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsifiner.attention import SparseAttention, dense_connectivity
from sparsifiner.convert import sparse_layers
from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.layout import Side
from sparsifiner.hosts import host_of


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
        model: a model of a family in `sparsifiner.hosts`.

    Yields:
        A list that every forward fills anew with q and k, each [B, H, N, d], layer by layer.
    """
    host = host_of(model)
    projections: list[tuple[Tensor, Tensor]] = []

    def record(q: Tensor, k: Tensor) -> None:
        projections.append((q, k))

    first = host.attentions[0]
    handles = [first.register_forward_pre_hook(lambda module, args: projections.clear())]
    handles += [host.watch_projections(attention, record) for attention in host.attentions]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield projections
    finally:
        for handle in handles:
            handle.remove()


def _forget(traces: dict[int, LayerTrace], layer: SparseAttention) -> Any:
    def hook(module: nn.Module, args: Any) -> None:
        traces.pop(layer.place.index, None)

    return hook


def _record_lists(traces: dict[int, LayerTrace], layer: SparseAttention) -> Any:
    def hook(module: nn.Module, args: Any, connectivity: Connectivity) -> None:
        # kernels that read the lists as they are must not get them back: whoever has them may change them
        of_caller = replace(connectivity.alone(), check=False, selected=False)
        traces[layer.place.index] = LayerTrace(of_caller, args[3].summary, dense=False)

    return hook


def _record_rest(traces: dict[int, LayerTrace], layer: SparseAttention) -> Any:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        state = kwargs.get("state")
        if layer.place.index not in traces:
            layout = layer.current_layout(args[0].shape[1]) if state is None else state.layout
            lists = dense_connectivity(len(args[0]), layer.num_heads, layout, layer.config.tile, args[0])
            traces[layer.place.index] = LayerTrace(lists, None, dense=True)
        if state is not None:
            traces[layer.place.index] = replace(traces[layer.place.index], positions=state.positions)

    return hook
