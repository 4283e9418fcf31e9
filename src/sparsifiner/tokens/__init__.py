"""Token sparsity: fewer tokens from block to block, with any kind of attention.

Options cost no torch; what is made of them is loaded when it is first used.
"""

from typing import TYPE_CHECKING

from sparsifiner.choices import Choices
from sparsifiner.lazy import loader
from sparsifiner.tokens.dynamicvit.options import DynamicViT
from sparsifiner.tokens.evit.options import EViT
from sparsifiner.tokens.method import Counts, TokenMethod
from sparsifiner.tokens.tome.options import ToMe

if TYPE_CHECKING:
    from sparsifiner.tokens.reducer import TokenReducer
    from sparsifiner.tokens.state import TokenState

__all__ = [
    "TOKENS",
    "Counts",
    "DynamicViT",
    "EViT",
    "ToMe",
    "TokenMethod",
    "TokenReducer",
    "TokenState",
]

TOKENS: Choices[TokenMethod] = Choices(
    "tokens",
    TokenMethod,  # type: ignore[type-abstract]
    {"evit": EViT, "dynamicvit": DynamicViT, "tome": ToMe},
)

__getattr__ = loader(
    __name__, {"TokenReducer": "sparsifiner.tokens.reducer", "TokenState": "sparsifiner.tokens.state"}
)
