"""How much a tile's result would change without a key: training-free, and better than a pooled score."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsifiner.geometry.connectivity import Connectivity
from sparsifiner.geometry.layout import Side
from sparsifiner.ops.attend_selected.operators import attend_impact
from sparsifiner.ops.precision import accumulation_dtype
from sparsifiner.ops.select import operators
from sparsifiner.scorers.base import ListSpec, RowScores, Scorer
from sparsifiner.scorers.impact.options import Impact


class ImpactScorer(Scorer):
    """Scores a key by its attention probability, times how far its value is from what stands for it.

    ```
    q̄_s         = mean query of square s of `pool` x `pool` queries
    K̄_w, V̄_w    = mean key and value of window w, of n_w patches
    Z_s         = Σ_prefix exp(q̄_s·k · scale) + Σ_w n_w exp(q̄_s·K̄_w · scale)
    score[t, j] = max_{s in tile t} (q̄_s·k_j · scale - log Z_s) + log ‖v_j - V̄_w(j)‖
    ```

    Where a tile is one square Z_s changes no order and is left out.

    Windows are those of the summaries; without summaries all patches are one, since nothing nearer stands for
    a key that is not listed. A mean over a whole tile hides what few of its queries look for, so that squares
    smaller than the tile score. It costs 1 / pool² of QKᵀ, and the windows their share of that. Lists of
    fewer keys than a quarter of a tile's queries, as in the last layers, are not worth it: there a tile is
    one square.
    """

    FUSED = operators.select_impact
    ATTENDING = attend_impact

    options: Impact

    def row_scores(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> RowScores:
        """See `Scorer.row_scores`."""
        query, log_mass, log_deviation = self.parts(q, k, v, spec)
        squares = spec.layout.squares_of_tiles(spec.tile, self.pool_side(spec), q.device)
        key = k.to(query.dtype).flatten(0, 1).mT
        unless_given = query.new_zeros(()).expand(query.shape[:3])
        offset = -(unless_given if log_mass is None else log_mass)

        def scores(start: int, stop: int) -> Tensor:
            rows = squares[start:stop]
            own_query = query[:, :, rows].view(-1, rows.numel(), q.shape[-1])
            own_offset = offset[:, :, rows].view(-1, rows.numel(), 1)
            logits = torch.baddbmm(own_offset, own_query, key, alpha=spec.scale)  # [B * H, rows * m, N]
            logits = logits.view(*q.shape[:2], *rows.shape, k.shape[2])
            return logits.amax(3) + log_deviation[:, :, None]

        return scores

    def parts(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> tuple[Tensor, Tensor | None, Tensor]:
        """What scores are made of, in fp32 or better.

        Args:
            q: [B, H, N, d] unscaled queries.
            k: [B, H, N, d] keys.
            v: [B, H, N, d] values.
            spec: the lists wanted.

        Returns:
            q̄ [B, H, squares, d], log Z [B, H, squares] if it is needed, and the log of each value's distance
            [B, H, N], 0 for prefix tokens.
        """
        layout, prefix = spec.layout, spec.layout.prefix
        accurate = accumulation_dtype(q.dtype)
        side = self._window_side(spec)
        query = layout.square_means(q[:, :, prefix:].to(accurate), self.pool_side(spec))
        log_mass = None
        if self.pool_side(spec) < spec.tile:
            mean_key = layout.square_means(k[:, :, prefix:].to(accurate), side)
            size = layout.square_sizes(side, q.device).to(accurate)
            of_prefix = query @ k[:, :, :prefix].to(accurate).mT * spec.scale
            of_windows = query @ mean_key.mT * spec.scale + size.log()
            log_mass = torch.cat([of_prefix, of_windows], -1).logsumexp(-1)
        value = v[:, :, prefix:].to(accurate)
        mean_value = layout.square_means(value, side)
        by_window = (layout.split_squares(value, side) - mean_value[:, :, :, None]).norm(dim=-1, keepdim=True)
        deviation = layout.merge_squares(by_window, side).squeeze(-1)
        return query, log_mass, F.pad(deviation.log(), (prefix, 0))

    def pool_side(self, spec: ListSpec) -> int:
        """Side of the squares whose mean queries score."""
        return pool_side(self.options, spec)

    @staticmethod
    def _window_side(spec: ListSpec) -> Side:
        return spec.summary or spec.layout.whole()

    def can_fuse(self, spec: ListSpec) -> bool:
        """See `Scorer.can_fuse`: single queries, too."""
        return True

    def fused_lists(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec, backend: str) -> Connectivity:
        """See `Scorer.fused_lists`."""
        geometry = spec.layout.for_kernels(spec.tile, self.pool_side(spec), self._window_side(spec))
        sizes = (spec.scale, spec.budget, spec.forced)
        listed, means = operators.select_impact(q, k, v, geometry, *sizes, backend)
        # without summaries nobody asks for the mean of all patches, and native attention has its own
        return spec.connectivity(listed, means if spec.summary is not None and means.numel() else None)

    @classmethod
    def attending_sizes(cls, options: Any, spec: ListSpec) -> tuple[Any, ...]:
        """See `Scorer.attending_sizes`."""
        sides = (spec.tile, pool_side(options, spec), cls._window_side(spec), spec.summary)
        return spec.layout.for_kernels(*sides), spec.scale, spec.budget, spec.forced

    def macs(self, spec: ListSpec, num_heads: int, head_dim: int) -> int:
        """See `Scorer.macs`: products of mean queries with all keys, and with prefix and windows for Z."""
        layout, pool = spec.layout, self.pool_side(spec)
        keys = layout.tokens
        if pool < spec.tile:
            keys += layout.prefix + layout.squares(self._window_side(spec))
        return num_heads * layout.squares(pool) * keys * head_dim

    def elements_per_row(self, spec: ListSpec) -> int:
        """See `Scorer.elements_per_row`: all squares of a tile."""
        return spec.layout.tokens * spec.layout.squares_per_tile(spec.tile, self.pool_side(spec))

    def extra_repr(self) -> str:
        """Side of the squares."""
        return f"pool={self.options.pool}"


def pool_side(options: Impact, spec: ListSpec) -> int:
    """Side of the squares whose mean queries score."""
    if spec.budget - spec.forced < spec.layout.square_patches(spec.tile) // 4:
        return spec.tile
    return options.pool or (spec.tile if spec.tile % 2 else spec.tile // 2)
