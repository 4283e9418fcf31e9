"""Frozen dataclasses that are looked up by in every call of a layer."""

from typing import Any, TypeVar

Kind = TypeVar("Kind")
_HASH = "_hash"


def hashed_once(kind: type[Kind]) -> type[Kind]:
    """Makes a frozen dataclass keep its hash once it is computed; copies of it compute their own."""
    compute = kind.__hash__

    def __hash__(self: Any) -> int:  # noqa: N807, it becomes the class's
        found: int | None = self.__dict__.get(_HASH)
        if found is None:
            found = self.__dict__[_HASH] = compute(self)
        return found

    def __getstate__(self: Any) -> dict[str, Any]:  # noqa: N807
        return {name: value for name, value in self.__dict__.items() if name != _HASH}

    for method in (__hash__, __getstate__):
        setattr(kind, method.__name__, method)
    return kind
