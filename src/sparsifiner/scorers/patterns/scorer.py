"""Scorers to compare with: fixed patterns and chance."""

import torch
from torch import Tensor

from sparsifiner.scorers.base import ListSpec, RowScores, Scorer
from sparsifiner.scorers.options import Place, ScorerOptions
from sparsifiner.scorers.patterns.options import BigBird, Random, Window


class _FixedScorer(Scorer):
    """Scores that depend on positions alone cost no multiplications."""

    def macs(self, spec: ListSpec, num_heads: int, head_dim: int) -> int:
        """See `Scorer.macs`."""
        return 0


class WindowScorer(_FixedScorer):
    """The keys nearest to the centre of the tile; prefix keys count as nearest.

    Where tokens were dropped, distance is along the curve in which the others lie.
    """

    def row_scores(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> RowScores:
        """See `Scorer.row_scores`."""
        layout = spec.layout
        position = layout.positions(q.device).float()  # [patches, 2]
        centre = layout.square_means(position[None, None], spec.tile)[0, 0]  # [rows, 2]

        def scores(start: int, stop: int) -> Tensor:
            distance = (centre[start:stop, None] - position).square().sum(-1)
            nearness = torch.nn.functional.pad(-distance, (layout.prefix, 0), value=torch.inf)
            return nearness.expand(1, q.shape[1], -1, -1)

        return scores


class StridedScorer(_FixedScorer):
    """Every s-th token, counted from the row's first token, with s as wide as the budget allows.

    Source:
        Child et al., "Generating Long Sequences with Sparse Transformers", 2019: the strided pattern.
    """

    def row_scores(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> RowScores:
        """See `Scorer.row_scores`."""
        N = spec.layout.tokens
        stride = -(-N // spec.budget)
        first = spec.layout.square_tokens(spec.tile, q.device)[:, :1]  # [rows, 1]
        token = torch.arange(N, device=q.device)

        def scores(start: int, stop: int) -> Tensor:
            behind = (token - first[start:stop]) % stride
            return -behind.float().expand(1, q.shape[1], -1, -1)

        return scores


class RandomScorer(_FixedScorer):
    """Uniform scores, fixed by (seed, layer): the same for every image, device and chunking."""

    options: Random

    def row_scores(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> RowScores:
        """See `Scorer.row_scores`."""
        N, H = spec.layout.tokens, q.shape[1]
        # filled on the device: a copy from the host cannot be captured in a CUDA graph
        seed = torch.full((), self.options.seed, dtype=torch.int64, device=q.device)
        stream = _hash(_hash(seed) + self.layer)
        head = _hash(torch.arange(H, device=q.device) + stream).view(1, H, 1, 1)
        token = torch.arange(N, device=q.device)

        def scores(start: int, stop: int) -> Tensor:
            row = torch.arange(start, stop, device=q.device).view(-1, 1)
            bits = _hash(_hash(row + head) + token)
            return (bits >> 8).float()  # 24 bits are exact in fp32

        return scores

    def extra_repr(self) -> str:
        """Seed and layer."""
        return f"seed={self.options.seed}, layer={self.layer}"


class BigBirdScorer(_FixedScorer):
    """Half the list as `WindowScorer` chooses it, the rest as `RandomScorer` does.

    Source:
        Zaheer et al., "Big Bird: Transformers for Longer Sequences", NeurIPS 2020: window, random and global
        keys; the global ones are the prefix tokens, which count as nearest.
    """

    options: BigBird

    def __init__(self, options: BigBird, place: Place) -> None:
        super().__init__(options, place)
        self.window = WindowScorer(Window(), place)
        self.random = RandomScorer(Random(seed=options.seed), place)

    def configure(self, options: ScorerOptions) -> None:
        """See `Scorer.configure`."""
        super().configure(options)
        self.random.configure(Random(seed=self.options.seed))

    def place_at(self, layer: int) -> None:
        """See `Scorer.place_at`."""
        super().place_at(layer)
        self.random.place_at(layer)

    def row_scores(self, q: Tensor, k: Tensor, v: Tensor, spec: ListSpec) -> RowScores:
        """See `Scorer.row_scores`."""
        nearness = self.window.row_scores(q, k, v, spec)
        chance = self.random.row_scores(q, k, v, spec)
        near = -(-spec.budget // 2)

        def scores(start: int, stop: int) -> Tensor:
            by_nearness = nearness(start, stop)
            nearest = by_nearness.topk(near, -1).indices
            return chance(start, stop).scatter(-1, nearest, torch.inf)

        return scores


def _hash(x: Tensor) -> Tensor:
    """Mixes the low 32 bits of int64 numbers; a counter-based generator needs no state.

    Source:
        The two-multiplication integer mixers of Chris Wellons' hash prospector, public domain.
    """
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)
