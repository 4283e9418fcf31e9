"""DynamicViT: a small network predicts which patches stay."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from sparsifiner.lazy import resolve
from sparsifiner.tokens.method import Counts, TokenMethod, check_at, check_keep, share_of, stages_of

if TYPE_CHECKING:
    from sparsifiner.tokens.reducer import TokenReducer

Placement = Literal["before attention", "after attention"]

_REDUCER = "sparsifiner.tokens.dynamicvit.reducer:PredictingReducer"


@dataclass(frozen=True)
class DynamicViT(TokenMethod):
    """Drops the patches that a predictor scores lowest.

    The predictor is trained with the model: `sparsifiner train` draws which patches stay (Gumbel-softmax; the
    others stay in the sequence, masked from attention) and holds their share at `keep`.

    Attributes:
        keep: share of the patches left by the first stage; the second leaves `keep ** 2`, and so on.
        placement: "before attention" of the blocks, as released, or "after attention", as in the Sparsifiner
            paper's count.
        at: the blocks; a quarter, a half and three quarters of the depth by default.

    Source:
        Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification",
        NeurIPS 2021.
    """

    keep: float = 0.7
    placement: Placement = "before attention"
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Rejects impossible values."""
        check_keep(self.keep)
        if self.placement not in get_args(Placement):
            raise ValueError(
                f"tokens: placement={self.placement!r} is unknown; choose one of {get_args(Placement)}"
            )
        object.__setattr__(self, "at", check_at(self.at))

    def reducer(self, layer: int, depth: int, width: int, patches: int) -> "TokenReducer | None":
        """See `TokenMethod.reducer`."""
        stages = stages_of(self.at, depth)
        if layer not in stages:
            return None
        stage = stages.index(layer) + 1
        reducer: TokenReducer = resolve(_REDUCER)(self.keep, stage, self.placement, width)
        return reducer

    def counts(self, depth: int, patches: int, prefix: int) -> list[Counts]:
        """See `TokenMethod.counts`."""
        stages = stages_of(self.at, depth)
        counts, left = [], patches
        for layer in range(depth):
            before = seen = left
            if layer in stages:
                left = share_of(patches, self.keep, stages.index(layer) + 1)
                seen = left if self.placement == "before attention" else before
            counts.append(Counts(prefix + seen, prefix + left, gone=before - left))
        return counts
