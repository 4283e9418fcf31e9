"""Public entry of sparse attention: checks and the choice of a backend."""

import functools
import logging
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifiner.eager import wants_gradients
from sparsifiner.geometry.connectivity import Connectivity, ScoredLists
from sparsifiner.geometry.curve import CurveLayout
from sparsifiner.geometry.layout import Layout, Run, Side
from sparsifiner.ops.backends import resolve_backend
from sparsifiner.ops.precision import without_autocast
from sparsifiner.ops.sparse_attention import operators, reference, torch_backend

_logger = logging.getLogger(__name__)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    connectivity: Connectivity,
    summary: Side | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every query over its listed keys, with summary keys for what the lists leave out.

    Patch queries attend to the keys of their row's list and, with `summary`, to the mean key and
    value of every window of `summary` x `summary` patches, whose logit gains the log of the number
    of its tokens that the list does not hold. Prefix queries attend to all single keys and to no
    summaries. A list of all keys is therefore exactly dense attention, with or without summaries.
    A query without any key (an empty list, no summaries) gives zeros.

    Args:
        q: [B, H, N, d] queries, any floating dtype; may be strided views of one qkv projection.
        k: [B, H, N, d] keys.
        v: [B, H, N, d] values.
        connectivity: key lists for [B, H] and the geometry of the N tokens.
        summary: side of the windows in patches, None for no summaries. Where `connectivity` is along a curve
            windows are runs of `summary` * `summary` patches, or such a `Run` as is given.
        scale: factor of the logits, `d ** -0.5` by default.
        backend: "auto", "reference" (dense with a mask), "torch" (gathers), "cpu" (native code for head dims
            that are multiples of 16; where gradients are wanted "torch" computes in its place, so compile
            and export for inference within `torch.no_grad()`) or, on a GPU, "triton" (fused kernels, for head
            dims that are multiples of 8 up to 128).

    Returns:
        [B, H, N, d] in the dtype of `q`.

    Raises:
        TypeError: q, k and v differ in dtype or are not floating point.
        ValueError: a shape does not fit `connectivity`, or `summary` or `backend` is impossible.

    Source:
        Wei et al., "Sparsifiner", CVPR 2023, section 3.3; tiles and summaries are ours.
    """
    return attend_scored(q, k, v, connectivity.alone(), summary=summary, scale=scale, backend=backend)


def attend_scored(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    connectivity: Connectivity,
    *,
    backend: str = "auto",
    scale: float | None = None,
    summary: Side | None = None,
    fused: bool = True,
) -> Tensor:
    """As `sparse_attention`, by lists that a scorer made from these very keys, values and windows.

    Without `fused` gradients can be differentiated again: where they are wanted no fused kernel computes.
    """
    means = connectivity.window_means if isinstance(connectivity, ScoredLists) and summary else None
    layout = connectivity.layout
    _check(q, k, v, connectivity, layout, summary)
    if not connectivity.indices.shape[-1]:  # no backend has to know lists without a slot
        empty = F.pad(connectivity.indices, (0, 1), value=-1)
        connectivity = replace(connectivity, indices=empty, check=False, selected=True)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    windows = layout.squares(summary) if summary else 0
    chosen = resolve_backend(backend, "sparse_attention", q.device, q, {"windows": windows})
    training = wants_gradients(q, k, v)
    if training and (chosen == "cpu" or (backend == "auto" and not fused)):
        if chosen == "cpu" and not torch.compiler.is_compiling():  # compiled code cannot log
            _say_torch_has_the_gradients()
        chosen = "torch"
    with without_autocast(q.device):
        if chosen == "reference":
            return reference.sparse_attention(q, k, v, connectivity, summary, scale)
        # kernels take the largest product for that of the largest logit, and some divide by the scale
        if scale < 0:
            q, scale = -q, -scale
        elif scale == 0:
            q, scale = q * 0, 1.0
        if chosen == "torch":
            return torch_backend.sparse_attention(q, k, v, connectivity, summary, scale, fused)
        geometry = layout.for_kernels(connectivity.tile, summary)
        # packing reads no token that is not there, so that lists which were seen to ascend will do
        ascending = connectivity.selected or (connectivity.tile == 1 and connectivity.ascends())
        lists = (connectivity.indices, ascending)
        out: Tensor = operators.attend(q, k, v, *lists, means, geometry, scale, training, chosen)[0]
        return out


def _check(
    q: Tensor, k: Tensor, v: Tensor, connectivity: Connectivity, layout: Layout, summary: Side | None
) -> None:
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            "sparse_attention: q, k and v must share one floating dtype, "
            f"got {q.dtype}, {k.dtype} and {v.dtype}"
        )
    if q.ndim != 4 or not q.shape == k.shape == v.shape:
        raise ValueError(
            "sparse_attention: q, k and v must all be [B, H, N, d], "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    tokens = layout.tokens
    if q.shape[2] != tokens:
        raise ValueError(
            f"sparse_attention: q has {q.shape[2]} tokens but connectivity describes {tokens} "
            f"({connectivity.prefix} prefix tokens and a {layout})"
        )
    if connectivity.indices.shape[:2] != q.shape[:2]:
        raise ValueError(
            f"sparse_attention: connectivity.indices are for [B, H] = "
            f"{tuple(connectivity.indices.shape[:2])}, q has {tuple(q.shape[:2])}"
        )
    devices = {x.device for x in (q, k, v, connectivity.indices)}
    if len(devices) > 1:
        raise ValueError(
            "sparse_attention: q, k, v and connectivity.indices must be on one device, "
            f"got {', '.join(sorted(map(str, devices)))}"
        )
    _check_summary(layout, summary)


def _check_summary(layout: Layout, summary: Side | None) -> None:
    if summary is None or (isinstance(summary, Run) and isinstance(layout, CurveLayout)):
        return
    if not isinstance(summary, int) or summary < 1:
        raise ValueError(
            f"sparse_attention: summary must be a window side of at least 1 patch or None, got {summary!r}"
        )


@functools.cache
def _say_torch_has_the_gradients() -> None:
    _logger.info("sparsifiner: sparse_attention: 'cpu' is for inference, gradients take 'torch'")
