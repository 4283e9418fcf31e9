"""Tile-mean query · key: the scorer that needs no training."""

from typing import Any

from torch import Tensor

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.ops.attend_selected.operators import attend_pooled
from sparsifiner.ops.precision import accumulation_dtype
from sparsifiner.ops.select import operators
from sparsifiner.scorers.base import ListSpec, RowScores, Scorer


class PooledScorer(Scorer):
    """Scores a key by its product with the mean query of the tile.

    At tile 8 this costs 1/64 of QKᵀ; at tile 1 it is QKᵀ.
    """

    FUSED = operators.select_pooled
    ATTENDING = attend_pooled

    def row_scores(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> RowScores:
        """See `Scorer.row_scores`."""
        accurate = accumulation_dtype(q.dtype)
        query = spec.layout.square_means(q[:, :, spec.layout.prefix :].to(accurate), spec.tile)
        key = k.to(accurate).mT
        return lambda start, stop: query[:, :, start:stop] @ key

    def fused_lists(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec, backend: str) -> Connectivity:
        """See `Scorer.fused_lists`; on a CPU the scores are few and written."""
        geometry = spec.layout.for_kernels(spec.tile)
        return spec.connectivity(operators.select_pooled(q, k, geometry, spec.budget, spec.forced, backend))

    @classmethod
    def attending_sizes(cls, options: Any, spec: ListSpec) -> tuple[Any, ...]:
        """See `Scorer.attending_sizes`."""
        return spec.layout.for_kernels(spec.tile, spec.summary), spec.scale, spec.budget, spec.forced

    def macs(self, spec: ListSpec, num_heads: int, head_dim: int) -> int:
        """See `Scorer.macs`."""
        return num_heads * spec.rows * spec.layout.tokens * head_dim
