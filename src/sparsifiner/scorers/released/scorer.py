"""The low-rank scorer exactly as its authors released it, to the bit."""

from typing import Any

import torch
from torch import Tensor

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.geometry.layout import Layout
from sparsifiner.scorers.base import ListSpec, RowScores
from sparsifiner.scorers.lowrank.scorer import LowRankScorer, whole_layout
from sparsifiner.scorers.options import Place
from sparsifiner.scorers.released.options import Released


class ReleasedScorer(LowRankScorer):
    """Â = C̃ Ũᵀ with s = H ** -0.5 and K = N // 6, as a dense product whose ties `torch.topk` settles.

    Args:
        options: reduced dim and thresholds.
        place: tells the tokens N of the native size and the heads H.

    Source:
        The code of Wei et al., "Sparsifiner", CVPR 2023.
    """

    FUSED = None

    options: Released

    def __init__(self, options: Released, place: Place) -> None:
        super().__init__(options, place)
        self.num_heads = place.num_heads

    @classmethod
    def basis_size(cls, options: Any, layout: TokenLayout) -> int:
        """See `LowRankScorer.basis_size`: counted by the image size."""
        return max(1, layout.tokens // 6)

    @property
    def temperature(self) -> float:
        """See `LowRankScorer.temperature`."""
        return float(self.num_heads**-0.5)

    @property
    def used_coefficients(self) -> int:
        """See `LowRankScorer.used_coefficients`: zeros are multiplied too."""
        return self.up.shape[1]

    def factors(self, q: Tensor, k: Tensor, layout: Layout, tile: int) -> tuple[Tensor, Tensor]:
        """See `Scorer.factors`: all of C and the signed W_up, as the released code fits."""
        return self.coefficients(q, k, layout, tile), self._resampled_up(whole_layout(layout))

    def row_scores(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> RowScores:
        """See `Scorer.row_scores`."""
        largest = self._largest_coefficients(q, k, spec.layout, spec.tile)
        basis = self.basis(whole_layout(spec.layout)).to(largest.values.dtype).mT.contiguous()  # [K, N]
        zeros = largest.values.new_zeros(*largest.values.shape[:-1], self.up.shape[1])
        sparse = zeros.scatter(-1, largest.indices, largest.values)
        return lambda start, stop: sparse[:, :, start:stop] @ basis

    @torch.no_grad()
    def forward(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> Connectivity:
        """See `Scorer.forward`: all scores at once, and the selection of the released code."""
        indices = self.scores(q, k, v, spec).topk(spec.budget, -1).indices.sort(-1).values.int()
        return spec.connectivity(indices)
