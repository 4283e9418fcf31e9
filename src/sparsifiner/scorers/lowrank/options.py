"""Options of the paper's learned scorer."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from sparsifiner.checks import whole_number
from sparsifiner.scorers.options import ScorerOptions


@dataclass(frozen=True, kw_only=True)
class LowRank(ScorerOptions):
    """The paper's: a learned low-rank sketch of the attention map.

    Attributes:
        basis: basis size K.
        reduced_dim: head dim of its reduced queries and keys; half the head dim by default.
        coef_topk: coefficients that it keeps per row.
        basis_threshold: basis entries of at most this magnitude count as zero.
    """

    SCORER: ClassVar = "sparsifiner.scorers.lowrank.scorer:LowRankScorer"
    LEARNS: ClassVar = True
    TITLE: ClassVar = "low-rank scorer"
    COUNTED_IN_PAPER: ClassVar = True

    basis: int = 32
    reduced_dim: int | None = None
    coef_topk: int = 8
    basis_threshold: float = 0.02

    def __post_init__(self) -> None:
        """Rejects impossible sizes."""
        object.__setattr__(self, "basis", whole_number("basis", self.basis, 1, "the paper uses 32"))
        check_sizes(self)
        if self.coef_topk > self.basis:
            raise ValueError(f"coef_topk={self.coef_topk} exceeds basis={self.basis}; lower coef_topk")


def check_sizes(options: Any) -> None:
    """Rejects impossible sizes that `LowRank` and `Released` have in common, and makes numbers of them.

    Raises:
        TypeError: a size is no whole number.
        ValueError: a size is below 1, or the threshold is no magnitude.
    """
    if options.reduced_dim is not None:
        reduced_dim = whole_number("reduced_dim", options.reduced_dim, 1, "None takes half the head dim")
        object.__setattr__(options, "reduced_dim", reduced_dim)
    object.__setattr__(
        options, "coef_topk", whole_number("coef_topk", options.coef_topk, 1, "the paper uses 8")
    )
    threshold = options.basis_threshold
    is_number = isinstance(threshold, Real) and not isinstance(threshold, bool)
    if not (is_number and 0 <= float(threshold) < math.inf):
        raise ValueError(f"basis_threshold must be a number of at least 0, got {threshold!r}")
