"""Mask recall: how much of the dense attention the key lists keep."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsifiner.convert import sparse_layers
from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.models.features import token_states
from sparsifiner.tokens.sizes import weigh_by_size
from sparsifiner.tracing import trace, trace_projections

# attention probabilities that exist at once
_CHUNK_ELEMENTS = 2**24


@torch.no_grad()
def mask_recall(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, device: torch.device | str = "cpu"
) -> list[float]:
    """Share of each layer's dense attention mass that lies on its listed keys, mean over patch queries.

    Dense attention is the softmax over all of the layer's own queries and keys. Summary keys do not
    count: 1 means that the lists alone hold everything.

    Args:
        model: a sparse model in evaluation mode, on `device`; a dense one gives [].
        batches: pairs of images [B, 3, H, W] and labels, which are not used.
        device: where to compute.

    Returns:
        One number in [0, 1] per layer; 1 where the layer stays dense.

    Raises:
        ValueError: there is no image.
    """
    layers = sparse_layers(model, required=False)
    if not layers:
        return []
    kept, seen = [0.0] * len(layers), 0
    for images, _ in batches:
        with trace(model) as traces, trace_projections(model) as projections, token_states(model) as states:
            model(images.to(device, non_blocking=True))
        for index, layer in enumerate(layers):
            q, k = projections[index]
            sizes = states[index - 1].sizes if states and index else None
            if sizes is not None:
                q, k, _ = weigh_by_size(q, k, k, sizes, layer.scale)
            share = kept_attention(q, k, traces[index].connectivity, layer.scale)
            kept[index] += len(images) * share
        seen += len(images)
    if not seen:
        raise ValueError("batches: there is no image to measure mask recall on")
    return [total / seen for total in kept]


def kept_attention(q: Tensor, k: Tensor, connectivity: Connectivity, scale: float) -> float:
    """Mean share of the attention mass of patch queries that lies on their listed keys.

    Args:
        q: [B, H, N, d] queries, prefix included.
        k: [B, H, N, d] keys.
        connectivity: key lists of all B, H.
        scale: factor of the logits.
    """
    layout, tile = connectivity.layout, connectivity.tile
    slots = connectivity.indices.clamp(min=0).long()
    members = layout.square_tokens(tile, q.device)  # [rows, m], -1 where a tile at the edge lacks a patch
    B, H, N, _ = q.shape
    chunk = max(1, _CHUNK_ELEMENTS // (B * H * members.shape[1] * N))
    kept = torch.zeros((), dtype=torch.float64, device=q.device)
    for start in range(0, len(members), chunk):
        tokens = members[start : start + chunk]
        query = q[:, :, tokens.clamp(min=0).flatten()].float()  # [B, H, r * m, d]
        attention = (query @ k.float().mT * scale).softmax(-1).view(B, H, *tokens.shape, N)
        listed = slots[:, :, start : start + chunk, None].expand(-1, -1, -1, tokens.shape[1], -1)
        filled = connectivity.indices[:, :, start : start + chunk, None] >= 0
        mass = torch.where(filled, attention.gather(-1, listed), 0.0).sum(-1)
        kept += torch.where(tokens >= 0, mass, 0.0).sum(dtype=torch.float64)
    return float(kept / (B * H * layout.patches))
