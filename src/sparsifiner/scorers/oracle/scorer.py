"""The true attention, to compare with."""

import torch
from torch import Tensor

from sparsifiner.ops.precision import accumulation_dtype
from sparsifiner.scorers.base import ListSpec, RowScores, Scorer


class OracleScorer(Scorer):
    """The tile's mean attention probabilities: what a perfect scorer would rank by.

    It computes the whole dense attention, so it serves to compare, never to save.
    """

    def row_scores(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> RowScores:
        """See `Scorer.row_scores`."""
        accurate = accumulation_dtype(q.dtype)
        layout = spec.layout
        query = layout.split_squares(q[:, :, layout.prefix :].to(accurate), spec.tile)  # [B, H, T, m, d]
        key = k.to(accurate).mT
        exists = layout.split_squares(torch.ones_like(q[:1, :1, layout.prefix :, :1]), spec.tile)
        weight = exists / exists.sum(3, keepdim=True)  # [1, 1, T, m, 1]

        def scores(start: int, stop: int) -> Tensor:
            rows = query[:, :, start:stop]
            # one product per head: broadcast over the tiles, keys would be copied for each
            attention = (rows.flatten(2, 3) @ key * spec.scale).softmax(-1)
            by_tile = attention.view(*rows.shape[:4], key.shape[-1])
            return (by_tile * weight[:, :, start:stop]).sum(3)

        return scores

    def macs(self, spec: ListSpec, num_heads: int, head_dim: int) -> int:
        """See `Scorer.macs`: all of QKᵀ but its prefix rows."""
        return num_heads * spec.layout.patches * spec.layout.tokens * head_dim

    def elements_per_row(self, spec: ListSpec) -> int:
        """All queries of a tile."""
        return spec.layout.tokens * spec.layout.square_patches(spec.tile)
