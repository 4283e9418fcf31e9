"""What a token method is: options, which cost no torch, and what they ask of the blocks."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

from sparsifiner.ratios import exact_ratio

if TYPE_CHECKING:
    from sparsifiner.tokens.reducer import TokenReducer


@dataclass(frozen=True)
class Counts:
    """Tokens of one block.

    Attributes:
        attention: those that its attention sees.
        mlp: those that its MLP sees.
        fused: fused tokens among those that come in; they count as prefix.
        gone: patches that are dropped or merged in it.
    """

    attention: int
    mlp: int
    fused: int = 0
    gone: int = 0


@dataclass(frozen=True)
class TokenMethod(ABC):
    """Which tokens are dropped or merged, and where; a frozen dataclass of its options."""

    @abstractmethod
    def reducer(self, layer: int, depth: int, width: int, patches: int) -> "TokenReducer | None":
        """The module of one block, None where nothing happens.

        Args:
            layer: index of the block.
            depth: number of blocks.
            width: channels of a token.
            patches: at the model's native image size.
        """

    @abstractmethod
    def counts(self, depth: int, patches: int, prefix: int) -> list[Counts]:
        """Tokens that each block's attention and MLP see, prefix included.

        Args:
            depth: number of blocks.
            patches: patches of the image.
            prefix: prefix tokens.
        """

    def why_not(self, has_class_token: bool) -> str:
        """Why models with or without a class token cannot use the method; empty if they can."""
        return ""


def stages_of(at: tuple[int, ...] | None, depth: int) -> tuple[int, ...]:
    """Blocks where tokens are dropped: a quarter, a half and three quarters of the depth by default.

    Raises:
        ValueError: there is no such block.
    """
    if at is None:  # fewer in models of fewer than three blocks
        return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))
    if any(not 0 <= stage < depth for stage in at) or list(at) != sorted(set(at)):
        raise ValueError(f"tokens: at={list(at)} must be ascending blocks of 0 to {depth - 1}")
    return at


def share_of(patches: int, keep: float, times: int = 1) -> int:
    """`ceil(keep ** times * patches)`, computed exactly; at least 1."""
    numerator, denominator = exact_ratio(keep)  # a millionth is all but 0, which it gives
    share: int = -(-(numerator**times) * patches // denominator**times)
    return max(1, share)


def check_at(at: Any) -> tuple[int, ...] | None:
    """The blocks as a tuple; whether a model has them is seen when it is known.

    Raises:
        TypeError: they are no whole numbers.
    """
    if at is None:
        return None
    if not isinstance(at, Sequence) or any(
        isinstance(each, bool) or not isinstance(each, int) for each in at
    ):
        raise TypeError(f"tokens: at must be the blocks where tokens are dropped, as [3, 6, 9]; got {at!r}")
    return tuple(at)


def check_keep(keep: Any) -> None:
    """Rejects shares of tokens that are none.

    Raises:
        TypeError: it is no number.
        ValueError: it lies outside (0, 1].
    """
    if isinstance(keep, bool) or not isinstance(keep, Real):
        raise TypeError(f"tokens: keep must be a number in (0, 1], got {keep!r}")
    if not 0 < float(keep) <= 1:
        raise ValueError(f"tokens: keep must lie in (0, 1], the share of patches that stay; got {keep!r}")
