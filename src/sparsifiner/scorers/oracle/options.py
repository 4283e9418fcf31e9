"""Options of the scorer that computes what others guess: there are none."""

from dataclasses import dataclass
from typing import ClassVar

from sparsifiner.scorers.options import ScorerOptions


@dataclass(frozen=True, kw_only=True)
class Oracle(ScorerOptions):
    """The tile's mean attention itself, to compare with: it computes the whole dense attention."""

    SCORER: ClassVar = "sparsifiner.scorers.oracle.scorer:OracleScorer"
