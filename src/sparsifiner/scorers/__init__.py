"""Scorers: which keys matter to a row of queries.

Options cost no torch; the modules that are made of them are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from sparsifiner.choices import Choices
from sparsifiner.lazy import loader
from sparsifiner.scorers.impact.options import Impact
from sparsifiner.scorers.lowrank.options import LowRank
from sparsifiner.scorers.options import Place, ScorerOptions
from sparsifiner.scorers.oracle.options import Oracle
from sparsifiner.scorers.patterns.options import BigBird, Random, Strided, Window
from sparsifiner.scorers.pooled.options import Pooled
from sparsifiner.scorers.released.options import Released

if TYPE_CHECKING:
    from sparsifiner.scorers.base import ListSpec, Origin, Scorer
    from sparsifiner.scorers.impact.scorer import ImpactScorer
    from sparsifiner.scorers.lowrank.scorer import LowRankScorer
    from sparsifiner.scorers.oracle.scorer import OracleScorer
    from sparsifiner.scorers.patterns.scorer import BigBirdScorer, RandomScorer, StridedScorer, WindowScorer
    from sparsifiner.scorers.pooled.scorer import PooledScorer
    from sparsifiner.scorers.released.scorer import ReleasedScorer
    from sparsifiner.scorers.shared import BorrowingScorer, SharedLists

__all__ = [
    "SCORERS",
    "BigBird",
    "BigBirdScorer",
    "BorrowingScorer",
    "Impact",
    "ImpactScorer",
    "ListSpec",
    "LowRank",
    "LowRankScorer",
    "Oracle",
    "OracleScorer",
    "Origin",
    "Place",
    "Pooled",
    "PooledScorer",
    "Random",
    "RandomScorer",
    "Released",
    "ReleasedScorer",
    "Scorer",
    "ScorerOptions",
    "SharedLists",
    "Strided",
    "StridedScorer",
    "Window",
    "WindowScorer",
]

SCORERS: Choices[ScorerOptions] = Choices(
    "scorer",
    ScorerOptions,
    {
        "impact": Impact,
        "lowrank": LowRank,
        "released": Released,
        "pooled": Pooled,
        "oracle": Oracle,
        "window": Window,
        "strided": Strided,
        "random": Random,
        "bigbird": BigBird,
    },
)

_PATTERNS = "sparsifiner.scorers.patterns.scorer"
_HOMES = {
    "BigBirdScorer": _PATTERNS,
    "BorrowingScorer": "sparsifiner.scorers.shared",
    "ImpactScorer": "sparsifiner.scorers.impact.scorer",
    "ListSpec": "sparsifiner.scorers.base",
    "LowRankScorer": "sparsifiner.scorers.lowrank.scorer",
    "OracleScorer": "sparsifiner.scorers.oracle.scorer",
    "Origin": "sparsifiner.scorers.base",
    "PooledScorer": "sparsifiner.scorers.pooled.scorer",
    "RandomScorer": _PATTERNS,
    "ReleasedScorer": "sparsifiner.scorers.released.scorer",
    "Scorer": "sparsifiner.scorers.base",
    "SharedLists": "sparsifiner.scorers.shared",
    "StridedScorer": _PATTERNS,
    "WindowScorer": _PATTERNS,
}

__getattr__ = loader(__name__, _HOMES)
