"""Options of the scorer that weighs what a tile would lose."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsifiner.checks import whole_number
from sparsifiner.scorers.options import ScorerOptions

if TYPE_CHECKING:
    from sparsifiner.config import SparsifyConfig


@dataclass(frozen=True, kw_only=True)
class Impact(ScorerOptions):
    """Attention of the mean queries of parts of a tile, times how far a value is from its window's mean.

    Needs no training.

    Attributes:
        pool: side in patches of the squares whose mean queries score, a divisor of the tile's; None for half
            of it, or for all of an odd one. Lists of fewer keys than a quarter of a tile's queries are scored
            by the whole tile's mean all the same.
    """

    SCORER: ClassVar = "sparsifiner.scorers.impact.scorer:ImpactScorer"

    pool: int | None = None

    def __post_init__(self) -> None:
        """Rejects sides that are none."""
        if self.pool is not None:
            pool = whole_number("pool", self.pool, 1, "None takes half of the tile's side")
            object.__setattr__(self, "pool", pool)

    def check(self, config: "SparsifyConfig") -> None:
        """See `ScorerOptions.check`."""
        if self.pool is not None and config.tile % self.pool:
            raise ValueError(f"pool={self.pool} must divide tile={config.tile}, whose queries it groups")
