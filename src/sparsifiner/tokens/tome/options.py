"""ToMe: merges the pairs of tokens that are most alike."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsifiner.lazy import resolve
from sparsifiner.tokens.method import Counts, TokenMethod

if TYPE_CHECKING:
    from sparsifiner.tokens.reducer import TokenReducer

_REDUCER = "sparsifiner.tokens.tome.reducer:MergingReducer"


@dataclass(frozen=True)
class ToMe(TokenMethod):
    """Merges pairs of patches between attention and MLP of every block, by the likeness of their keys.

    A merged token is the mean of its patches and counts as many times in the softmax. It stays where the
    second of the pair was. Needs no training.

    Attributes:
        r: pairs that are merged in each block; at most half of the patches that are left.

    Source:
        Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
    """

    r: int = 8

    def __post_init__(self) -> None:
        """Rejects impossible numbers."""
        if isinstance(self.r, bool) or not isinstance(self.r, int):
            raise TypeError(f"tokens: r must be a whole number of pairs per block, got {self.r!r}")
        if self.r < 1:
            raise ValueError(f"tokens: r must be at least 1, got {self.r}; leave tokens out to merge none")

    def reducer(self, layer: int, depth: int, width: int, patches: int) -> "TokenReducer | None":
        """See `TokenMethod.reducer`."""
        reducer: TokenReducer = resolve(_REDUCER)(self.r)
        return reducer

    def counts(self, depth: int, patches: int, prefix: int) -> list[Counts]:
        """See `TokenMethod.counts`."""
        counts = []
        for _ in range(depth):
            merged = min(self.r, patches // 2)
            counts.append(Counts(prefix + patches, prefix + patches - merged, gone=merged))
            patches -= merged
        return counts
