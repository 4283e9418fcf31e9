"""Options of the patterns that look at no image, to compare with."""

from dataclasses import dataclass
from typing import Any, ClassVar

from sparsifiner.checks import whole_number
from sparsifiner.scorers.options import ScorerOptions


@dataclass(frozen=True, kw_only=True)
class Window(ScorerOptions):
    """The keys nearest to the tile."""

    SCORER: ClassVar = "sparsifiner.scorers.patterns.scorer:WindowScorer"


@dataclass(frozen=True, kw_only=True)
class Strided(ScorerOptions):
    """Every s-th key."""

    SCORER: ClassVar = "sparsifiner.scorers.patterns.scorer:StridedScorer"


@dataclass(frozen=True, kw_only=True)
class Random(ScorerOptions):
    """Keys by chance, the same for every image.

    Attributes:
        seed: of the whole model, below 2 ** 32.
    """

    SCORER: ClassVar = "sparsifiner.scorers.patterns.scorer:RandomScorer"

    seed: int = 0

    def __post_init__(self) -> None:
        """Rejects seeds that are none."""
        _check_seed(self)


@dataclass(frozen=True, kw_only=True)
class BigBird(ScorerOptions):
    """Half the keys by nearness, half by chance.

    Attributes:
        seed: of the whole model, below 2 ** 32.
    """

    SCORER: ClassVar = "sparsifiner.scorers.patterns.scorer:BigBirdScorer"

    seed: int = 0

    def __post_init__(self) -> None:
        """Rejects seeds that are none."""
        _check_seed(self)


def _check_seed(options: Any) -> None:
    seed = whole_number("seed", options.seed, 0, "any whole number below 2 ** 32 will do")
    if seed >= 2**32:
        raise ValueError(f"seed must be below 2 ** 32, got {seed}; any whole number from 0 will do")
    object.__setattr__(options, "seed", seed)
