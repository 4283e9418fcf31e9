"""Checks of arguments, whose errors say what was expected and what to do."""

from numbers import Integral
from typing import Any


def whole_number(name: str, value: Any, least: int, remedy: str) -> int:
    """The value as an int.

    Args:
        name: of the argument.
        value: what was given.
        least: the smallest that will do.
        remedy: how the error ends.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be a whole number of at least {least}, got {value!r}; {remedy}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}; {remedy}")
    return int(value)
