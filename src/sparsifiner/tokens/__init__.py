"""Token sparsity: fewer tokens from block to block, with any kind of attention."""

from dataclasses import asdict, fields
from typing import Any

from sparsifiner.tokens.dynamicvit import DynamicViT
from sparsifiner.tokens.evit import EViT
from sparsifiner.tokens.method import Counts, TokenMethod, TokenReducer
from sparsifiner.tokens.state import TokenState
from sparsifiner.tokens.tome import ToMe

__all__ = [
    "TOKEN_METHODS",
    "Counts",
    "DynamicViT",
    "EViT",
    "ToMe",
    "TokenMethod",
    "TokenReducer",
    "TokenState",
    "describe_tokens",
    "read_tokens",
]

TOKEN_METHODS: dict[str, type[DynamicViT] | type[EViT] | type[ToMe]] = {
    "evit": EViT,
    "dynamicvit": DynamicViT,
    "tome": ToMe,
}


def describe_tokens(method: TokenMethod | None) -> dict[str, Any] | None:
    """A method as plain values, which `read_tokens` understands."""
    if method is None:
        return None
    names = [name for name, kind in TOKEN_METHODS.items() if type(method) is kind]
    if not names:
        raise TypeError(f"tokens={method!r} is none of {', '.join(TOKEN_METHODS)}")
    return {"method": names[0], **asdict(method)}  # type: ignore[call-overload]


def read_tokens(values: dict[str, Any] | None) -> TokenMethod | None:
    """The method that `describe_tokens` described.

    Raises:
        TypeError: an option is of the wrong kind.
        ValueError: there is no such method or option, or its value is impossible.
    """
    if values is None:
        return None
    options = dict(values)
    name = options.pop("method", None)
    if name not in TOKEN_METHODS:
        raise ValueError(f"tokens: method={name!r} is unknown; choose one of {tuple(TOKEN_METHODS)}")
    known = [field.name for field in fields(TOKEN_METHODS[name])]
    if not options.keys() <= set(known):
        raise ValueError(f"tokens: {options} do not fit {name}, whose options are {', '.join(known)}")
    return TOKEN_METHODS[name](**options)
