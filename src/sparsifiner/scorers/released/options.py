"""Options of the scorer as its authors released it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from sparsifiner.scorers.lowrank.options import check_sizes
from sparsifiner.scorers.options import ScorerOptions

if TYPE_CHECKING:
    from sparsifiner.config import SparsifyConfig


@dataclass(frozen=True, kw_only=True)
class Released(ScorerOptions):
    """The low-rank scorer exactly as released: temperature H ** -0.5, basis size N // 6, dense products.

    N are the tokens of the native image size. It runs on the backend "reference".

    Attributes:
        reduced_dim: head dim of its reduced queries and keys; half the head dim by default.
        coef_topk: coefficients that it keeps per row.
        basis_threshold: basis entries of at most this magnitude count as zero.
    """

    SCORER: ClassVar = "sparsifiner.scorers.released.scorer:ReleasedScorer"
    LEARNS: ClassVar = True
    TITLE: ClassVar = "low-rank scorer"
    COUNTED_IN_PAPER: ClassVar = True

    reduced_dim: int | None = None
    coef_topk: int = 8
    basis_threshold: float = 0.02

    def __post_init__(self) -> None:
        """Rejects impossible sizes."""
        check_sizes(self)

    def check(self, config: "SparsifyConfig") -> None:
        """See `ScorerOptions.check`."""
        for name, value in {"tile": 1, "summary": None, "share": 1}.items():
            given = getattr(config, name)
            if given != value:
                raise ValueError(
                    f"scorer=Released() is the released method and needs {name}={value!r}, got {given!r}; "
                    "use preset='paper'"
                )
        if config.tokens is not None:
            raise ValueError("scorer=Released() is the released method, which takes tokens=None here")
        if config.backend not in {"auto", "reference"}:
            raise ValueError(
                f"scorer=Released() runs on backend='reference' only, got {config.backend!r}; "
                "set backend='auto'"
            )

    def backend(self, chosen: str) -> str:
        """See `ScorerOptions.backend`: the one that it runs on."""
        return "reference"
