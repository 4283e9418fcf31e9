"""EViT: keeps the patches that the class token attends to most."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sparsifiner.lazy import resolve
from sparsifiner.tokens.method import Counts, TokenMethod, check_at, check_keep, share_of, stages_of

if TYPE_CHECKING:
    from sparsifiner.tokens.reducer import TokenReducer

_REDUCER = "sparsifiner.tokens.evit.reducer:AttentiveReducer"


@dataclass(frozen=True)
class EViT(TokenMethod):
    """Drops patches between attention and MLP of some blocks, by the class token's attention.

    Attributes:
        keep: share of the patches that stay at each of these blocks, rounded up.
        fuse: put one token in the place of those that go: their sum, weighted by that attention. Heads that
            look at all patches, such as average pooling and LV-ViT's, see it as one of them.
        at: the blocks; a quarter, a half and three quarters of the depth by default.

    Source:
        Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via Token
        Reorganizations", ICLR 2022.
    """

    keep: float = 0.7
    fuse: bool = True
    at: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Rejects impossible shares."""
        check_keep(self.keep)
        object.__setattr__(self, "at", check_at(self.at))

    def reducer(self, layer: int, depth: int, width: int, patches: int) -> "TokenReducer | None":
        """See `TokenMethod.reducer`."""
        drops = self.keep < 1 and layer in stages_of(self.at, depth)
        if not drops:
            return None
        reducer: TokenReducer = resolve(_REDUCER)(self.keep, self.fuse)
        return reducer

    def counts(self, depth: int, patches: int, prefix: int) -> list[Counts]:
        """See `TokenMethod.counts`."""
        counts, fused = [], 0
        for layer in range(depth):
            before, left = fused, patches
            if layer in stages_of(self.at, depth):
                left = share_of(patches, self.keep)
                fused = int(self.fuse) if left < patches else fused
            seen = prefix + before + patches
            counts.append(Counts(seen, prefix + fused + left, before, patches - left))
            patches = left
        return counts

    def why_not(self, has_class_token: bool) -> str:
        """See `TokenMethod.why_not`."""
        return "" if has_class_token else "EViT needs a class token; use DynamicViT or ToMe"
