"""Names that a package loads when they are first used (PEP 562)."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def loader(
    package: str, homes: Mapping[str, str], before: Callable[[], object] | None = None
) -> Callable[[str], object]:
    """The `__getattr__` of a package whose names live in modules that are imported when asked for.

    Args:
        package: its name.
        homes: the module of each name.
        before: called before a name is loaded.
    """

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if before is not None:
            before()
        value = getattr(import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)  # found at once from now on
        return value

    return load


def resolve(name: str) -> Any:
    """What "package.module:name" names, its module imported now."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
