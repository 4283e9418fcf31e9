"""Choices by name: each is a frozen dataclass of its options, in a registry that reads and describes them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Option = TypeVar("Option")

METHOD = "method"  # names the choice among its options


class Choices(Generic[Option]):
    """What an argument may be: names, and for each the dataclass of its options.

    Args:
        argument: its name, for errors.
        base: what every one of these dataclasses is.
        kinds: those that there are from the beginning, by name.
    """

    def __init__(
        self, argument: str, base: type[Option], kinds: Mapping[str, type[Option]] | None = None
    ) -> None:
        self.argument = argument
        self.base = base
        self._kinds: dict[str, type[Option]] = {}
        for name, kind in (kinds or {}).items():
            self.add(name, kind)

    def add(self, name: str, kind: type[Option]) -> None:
        """Makes a choice known by a name: to the configuration, files and the command line.

        Args:
            name: a word.
            kind: a frozen dataclass, whose docstring tells of its options under "Attributes:".

        Raises:
            TypeError: it is no such dataclass.
            ValueError: the name is no word or taken, or an option is called "method".
        """
        # of its own: what a class inherits knows none of its options
        parameters = vars(kind).get("__dataclass_params__") if isinstance(kind, type) else None
        if parameters is None or not (parameters.frozen and issubclass(kind, self.base)):
            raise TypeError(
                f"{self.argument}: {kind!r} must be a frozen dataclass and a subclass of {self.base.__name__}"
            )
        if not name.isidentifier():
            raise ValueError(f"{self.argument}: name={name!r} must be a word, of letters, digits and _")
        if self._kinds.get(name, kind) is not kind:
            raise ValueError(f"{self.argument}: name={name!r} is taken by {self._kinds[name].__name__}")
        if METHOD in self._fields_of(kind):
            raise ValueError(f"{self.argument}: {kind.__name__} has an option {METHOD!r}; call it otherwise")
        self._kinds[name] = kind

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._kinds)

    def __getitem__(self, name: str) -> type[Option]:
        """The dataclass of a name.

        Raises:
            ValueError: there is none.
        """
        if name not in self._kinds:
            raise ValueError(f"{self.argument}={name!r} is unknown; choose one of {tuple(self)}")
        return self._kinds[name]

    def fields(self, name: str) -> tuple["Field[Any]", ...]:
        """The options of a choice.

        Raises:
            ValueError: there is no such choice.
        """
        return tuple(self._fields_of(self[name]).values())

    def name_of(self, option: Option) -> str:
        """The name by which a choice is known.

        Raises:
            TypeError: it has none.
        """
        for name, kind in self._kinds.items():
            if type(option) is kind:
                return name
        raise TypeError(
            f"{self.argument}={option!r} is none of {', '.join(self)}; make its class known by a name first, "
            "with add(name, class)"
        )

    def describe(self, option: Option) -> dict[str, Any]:
        """A choice as plain values, which `read` understands: its name as "method", and its options."""
        return {METHOD: self.name_of(option), **asdict(option)}  # type: ignore[call-overload]

    def read(self, values: "str | Mapping[str, Any] | Option") -> Option:
        """The choice that is meant.

        Args:
            values: a name, for its default options; what `describe` gives; or the choice itself.

        Raises:
            TypeError: `values` or an option is of the wrong kind, or an option without a default is missing.
            ValueError: there is no such choice or option, or an option is impossible.
        """
        if isinstance(values, self.base):
            return values
        if isinstance(values, str):
            return self._make(values, self[values], {})
        if not isinstance(values, Mapping):
            raise TypeError(
                f"{self.argument} must be one of {tuple(self)} or {self.base.__name__} with options, "
                f"got {values!r}"
            )
        options = dict(values)
        name = options.pop(METHOD, None)
        if name not in self._kinds:
            raise ValueError(f"{self.argument}: {METHOD}={name!r} is unknown; choose one of {tuple(self)}")
        return self._make(name, self._kinds[name], options)

    def _make(self, name: str, kind: type[Option], options: dict[str, Any]) -> Option:
        known = self._fields_of(kind)
        unknown = [option for option in options if option not in known]
        if unknown:
            raise ValueError(
                f"{self.argument}: {', '.join(unknown)} do not fit {name}, whose options are "
                f"{', '.join(known) or 'none'}"
            )
        hints = hints_of(kind)
        for option, field in known.items():
            if option in options:
                if not _fits(options[option], hints.get(option, Any)):
                    raise TypeError(
                        f"{self.argument}: {option} of {name} must be {type_name(hints.get(option, Any))}, "
                        f"got {options[option]!r}"
                    )
            elif field.default is MISSING and field.default_factory is MISSING:
                raise TypeError(f"{self.argument}: {name} needs {option}, which has no default; give it")
        # files have lists for tuples, but options are hashed: plans are remembered by them
        return kind(**{key: tuple(each) if isinstance(each, list) else each for key, each in options.items()})

    @staticmethod
    def _fields_of(kind: type[Option]) -> dict[str, "Field[Any]"]:
        return {field.name: field for field in fields(kind) if field.init}  # type: ignore[arg-type]


def hints_of(kind: type) -> dict[str, Any]:
    """Annotations of a class, {} where they name what is not there at run time."""
    try:
        return get_type_hints(kind)
    except NameError:
        return {}


def type_name(hint: Any) -> str:
    """A type as a reader writes it: `int | None`."""
    if hint is NoneType:
        return "None"
    if get_origin(hint) in {Union, UnionType}:
        return " | ".join(map(type_name, get_args(hint)))
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is what an annotation asks for; what is not known here is let through."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in {Union, UnionType}:
        return any(_fits(value, each) for each in inner)
    if origin is Literal:
        return value in inner
    if origin in {tuple, list, Sequence}:  # files have lists for tuples
        items = inner[0] if inner and (origin is not tuple or inner[1:] == (...,)) else Any
        return isinstance(value, list | tuple) and all(_fits(each, items) for each in value)
    if hint in {int, float}:
        number = Integral if hint is int else Real
        return isinstance(value, number) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in {bool, str, NoneType} else True
