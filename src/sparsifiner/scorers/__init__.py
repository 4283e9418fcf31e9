"""Scorers: which keys matter to a row of queries."""

from collections.abc import Callable

from sparsifiner.config import SparsifyConfig
from sparsifiner.geometry.grid import TokenLayout
from sparsifiner.scorers.base import ListSpec, Origin, Scorer
from sparsifiner.scorers.impact import ImpactScorer
from sparsifiner.scorers.lowrank import LowRankScorer
from sparsifiner.scorers.patterns import (
    BigBirdScorer,
    OracleScorer,
    RandomScorer,
    StridedScorer,
    WindowScorer,
)
from sparsifiner.scorers.pooled import PooledScorer
from sparsifiner.scorers.shared import BorrowingScorer, SharedLists

__all__ = [
    "BigBirdScorer",
    "BorrowingScorer",
    "ImpactScorer",
    "ListSpec",
    "LowRankScorer",
    "OracleScorer",
    "Origin",
    "PooledScorer",
    "RandomScorer",
    "Scorer",
    "SharedLists",
    "StridedScorer",
    "WindowScorer",
    "make_scorer",
]

_WITHOUT_OPTIONS: dict[str, Callable[[], Scorer]] = {
    "pooled": PooledScorer,
    "oracle": OracleScorer,
    "window": WindowScorer,
    "strided": StridedScorer,
}


def make_scorer(
    config: SparsifyConfig, layer: int, layout: TokenLayout, num_heads: int, head_dim: int
) -> Scorer:
    """Builds the scorer of one layer.

    Args:
        config: names the scorer and its options.
        layer: index of the layer.
        layout: tokens at the model's native image size.
        num_heads: heads of the layer.
        head_dim: d.
    """
    if config.scorer == "lowrank":
        return LowRankScorer(layout, num_heads, head_dim, config)
    if config.scorer == "impact":
        return ImpactScorer(config.pool)
    if config.scorer == "random":
        return RandomScorer(config.seed, layer)
    if config.scorer == "bigbird":
        return BigBirdScorer(config.seed, layer)
    return _WITHOUT_OPTIONS[config.scorer]()
