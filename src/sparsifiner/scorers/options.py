"""What the options of a scorer are: a frozen dataclass that costs no torch, and what it is asked."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from sparsifiner.hashed import hashed_once
from sparsifiner.lazy import resolve

if TYPE_CHECKING:
    from sparsifiner.config import SparsifyConfig
    from sparsifiner.geometry.grid import TokenLayout
    from sparsifiner.scorers.base import Scorer


@hashed_once
@dataclass(frozen=True)
class Place:
    """Which layer of a model it is that scorers are made for, and plans.

    Attributes:
        index: of the layer.
        depth: number of layers.
        native: its tokens at the image size that the model is made for.
        num_heads: H.
        head_dim: d.
        scale: factor of its logits.
    """

    index: int
    depth: int
    native: "TokenLayout"
    num_heads: int
    head_dim: int
    scale: float


@dataclass(frozen=True)
class ScorerOptions:
    """Which scorer, and how: a frozen dataclass of its options; `SCORERS.add` makes it known by a name.

    Class attributes:
        SCORER: its module, a subclass of `Scorer` that is made of these options and a place; or where that
            is, "package.module:Class", which is imported when the first one is made.
        LEARNS: whether it has weights.
        TITLE: what messages call it.
        COUNTED_IN_PAPER: whether the paper's tables count its MACs.
    """

    SCORER: ClassVar[Any] = ""
    LEARNS: ClassVar[bool] = False
    TITLE: ClassVar[str] = "scorer"
    COUNTED_IN_PAPER: ClassVar[bool] = False

    @classmethod
    def scorer_class(cls) -> "type[Scorer]":
        """The class of its modules."""
        kind: type[Scorer] = resolve(cls.SCORER) if isinstance(cls.SCORER, str) else cls.SCORER
        return kind

    def build(self, place: Place) -> "Scorer":
        """The module of one layer."""
        return self.scorer_class()(self, place)

    def check(self, config: "SparsifyConfig") -> None:
        """Rejects configurations with which it does not go; most go with all.

        Args:
            config: of which these options are a part, everything else checked.

        Raises:
            ValueError: names the option that is in the way, and the remedy.
        """

    def backend(self, chosen: str) -> str:
        """The backend of selection and attention, where the configuration says `chosen`."""
        return chosen
