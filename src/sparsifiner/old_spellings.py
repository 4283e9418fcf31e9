"""Spellings of scorers' options before these were objects: they work for this release and warn."""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, TypeVar

from sparsifiner.choices import METHOD
from sparsifiner.scorers import SCORERS, LowRank, Released, ScorerOptions

Kind = TypeVar("Kind", bound=type)

# fields that SparsifyConfig had
OLD_OPTIONS = ("pool", "basis", "reduced_dim", "coef_topk", "basis_threshold", "legacy", "seed")
# flags of the command line and keys of its files -> those fields, with what they take
OLD_FLAGS: dict[str, tuple[str, Any]] = {
    "pool": ("pool", int | None),
    "basis": ("basis", int | None),
    "reduced_dim": ("reduced_dim", int | None),
    "coef_topk": ("coef_topk", int | None),
    "basis_threshold": ("basis_threshold", float | None),
    "legacy": ("legacy", bool),
    "scorer_seed": ("seed", int | None),
}
# whose frames are not the user's
_NOT_THE_USER = ("sparsifiner", "timm", "dataclasses")


def takes_old_spellings(kind: Kind) -> Kind:
    """Lets the constructor of a configuration take the old fields too, with a warning for each call.

    Args:
        kind: a dataclass with a field "scorer".
    """
    construct: Callable[..., None] = kind.__init__  # type: ignore[misc]
    signature = inspect.signature(construct)

    @functools.wraps(construct)
    def __init__(self: Any, *args: Any, **options: Any) -> None:  # noqa: N807
        old = {name: options.pop(name) for name in OLD_OPTIONS if name in options}
        if old:
            bound = signature.bind(self, *args, **options)
            bound.apply_defaults()
            bound.arguments["scorer"], text = translated(SCORERS.read(bound.arguments["scorer"]), old)
            warn_user(text)
            args, options = bound.args[1:], bound.kwargs
        construct(self, *args, **options)

    kind.__init__ = __init__  # type: ignore[misc]
    return kind


def translated(scorer: ScorerOptions, old: Mapping[str, Any]) -> tuple[ScorerOptions, str]:
    """What old options make of a scorer, and the warning that says how to write it.

    Args:
        scorer: that is chosen.
        old: fields of old, of which those that the scorer does not have change nothing.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is impossible.
    """
    options = dict(old)
    legacy = options.pop("legacy", None)
    kind = type(scorer)
    if legacy and kind not in {LowRank, Released}:
        raise ValueError(
            "legacy=True is the released method and needs scorer='lowrank', "
            f"got {SCORERS.name_of(scorer)!r}; use preset='paper' with scorer=Released()"
        )
    if legacy is not None and kind in {LowRank, Released}:
        kind = Released if legacy else LowRank
    known = {field.name for field in fields(kind)}
    kept = {field.name: getattr(scorer, field.name) for field in fields(scorer) if field.name in known}
    unused = [name for name in options if name not in known]
    new = kind(**{**kept, **{name: value for name, value in options.items() if name in known}})
    spelled = ", ".join(f"{name}={value!r}" for name, value in old.items())
    text = f"sparsifiner: {spelled}: the next release knows this as scorer={spelling(new)}"
    if unused:
        text += f", and refuses {', '.join(unused)}, which changes nothing with this scorer"
    return new, text


def spelling(scorer: ScorerOptions) -> str:
    """How to write a scorer: with those options that are not the defaults."""
    told = [
        f"{field.name}={getattr(scorer, field.name)!r}"
        for field in fields(scorer)
        if field.default is MISSING or getattr(scorer, field.name) != field.default
    ]
    return f"{type(scorer).__name__}({', '.join(told)})"


def warn_user(text: str) -> None:
    """Warns at the line of the user's that called this package, or timm."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, DeprecationWarning, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] in _NOT_THE_USER


def modern_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a file holds of a configuration, with the scorer's options inside of it; without a warning."""
    old = {name: values[name] for name in OLD_OPTIONS if name in values}
    rest = {name: value for name, value in values.items() if name not in OLD_OPTIONS}
    if old:
        rest["scorer"], _ = translated(SCORERS.read(rest.get("scorer", "impact")), old)
    return rest


def old_flags_given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The old options of the command line or of its files that were given."""
    given = {flag: values.get(flag) for flag in OLD_FLAGS}
    return {flag: value for flag, value in given.items() if value is not None and value is not False}


def modern_settings(values: Mapping[str, Any], usual: ScorerOptions) -> dict[str, Any]:
    """Options of the command line, or of a run's settings, with those of choices inside of these.

    Args:
        values: by name, None for those that were not given.
        usual: the scorer where none is named.

    Raises:
        TypeError: an old option has the wrong type.
        ValueError: an old option is impossible.
    """
    rest = {name: value for name, value in values.items() if name not in OLD_FLAGS}
    rest["scorer"], rest["tokens"] = (named(values.get(name)) for name in ("scorer", "tokens"))
    if rest["scorer"] is not None:
        rest["scorer"] = {METHOD: SCORERS.name_of(usual), **rest["scorer"]}
    old = {OLD_FLAGS[flag][0]: value for flag, value in old_flags_given(values).items()}
    if old:
        scorer, _ = translated(usual if rest["scorer"] is None else SCORERS.read(rest["scorer"]), old)
        known = {field.name for field in fields(scorer)}
        told = {name: value for name, value in {**(rest["scorer"] or {}), **old}.items() if name in known}
        rest["scorer"] = {METHOD: SCORERS.name_of(scorer), **told}
    return rest


def named(choice: Any) -> Any:
    """A choice as a mapping, where it is a plain name."""
    return {METHOD: choice} if isinstance(choice, str) else choice
