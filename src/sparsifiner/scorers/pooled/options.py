"""Options of the scorer by mean queries: there are none."""

from dataclasses import dataclass
from typing import ClassVar

from sparsifiner.scorers.options import ScorerOptions


@dataclass(frozen=True, kw_only=True)
class Pooled(ScorerOptions):
    """Mean query of the tile times key: cheaper than impact, and needs no training either."""

    SCORER: ClassVar = "sparsifiner.scorers.pooled.scorer:PooledScorer"
