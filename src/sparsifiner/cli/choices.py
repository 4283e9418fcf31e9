"""Choices on the command line: how they are written, read from files and listed by --help."""

import dataclasses
import inspect
import json
import textwrap
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from docstring_parser import parse
from jsonargparse import DefaultHelpFormatter, get_loader, set_loader

from sparsifiner.choices import Choices, hints_of, type_name
from sparsifiner.old_spellings import named

# the mode of parsers whose files may have a plain name where options follow on the command line
PARSER_MODE = "yaml with choices"
_NAMES = ("scorer", "tokens")
_COLUMN, _WIDTH = 24, 80


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Leaves the lines of the list of choices as they are."""


def _load(text: str) -> Any:
    values = get_loader("yaml")(text)
    if isinstance(values, dict):
        return {name: named(value) if name in _NAMES else value for name, value in values.items()}
    return values


set_loader(PARSER_MODE, _load, exceptions=(yaml.YAMLError,))


def join_choices(arguments: Sequence[str]) -> list[str]:
    """`--scorer impact --scorer.pool 4`, in any order, as a mapping of which one option is set."""
    joined = list(arguments)
    for name in _NAMES:
        dotted = [index for index, word in enumerate(joined) if word.startswith(f"--{name}.")]
        if not dotted:
            continue
        plain = [index for index, word in enumerate(joined) if word.partition("=")[0] == f"--{name}"]
        for index in reversed(plain):
            width = 1 if "=" in joined[index] else 2
            words = joined[index : index + width]
            del joined[index : index + width]
            if index == plain[-1]:
                value = words[0].partition("=")[2] if width == 1 else words[-1]
                chosen = value if value.startswith("{") else json.dumps(named(value))
                first = next(at for at, word in enumerate(joined) if word.startswith(f"--{name}."))
                joined[first:first] = [f"--{name}", chosen]
    return joined


def list_choices(choices: Mapping[str, Choices[Any]]) -> str:
    """Every name with its options, their types and defaults, from dataclasses and their docstrings."""
    return "\n\n".join("\n".join(_lines(flag, each)) for flag, each in choices.items())


def _lines(flag: str, choices: Choices[Any]) -> Iterable[str]:
    yield f"--{flag} NAME, and --{flag}.OPTION VALUE for its options:"
    for name in choices:
        kind = choices[name]
        yield from _entry(f"  {name}", (inspect.getdoc(kind) or "").partition("\n")[0])
        documented = {entry.arg_name: entry.description or "" for entry in parse(kind.__doc__ or "").params}
        hints = hints_of(kind)
        for field in choices.fields(name):
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            told = "required" if default is dataclasses.MISSING else f"default: {json.dumps(default)}"
            taken = type_name(hints.get(field.name, field.type)).replace("None", "null")
            text = documented.get(field.name, "")
            yield from _entry(f"    .{field.name}", f"{text} (type: {taken}, {told})")


def _entry(head: str, text: str) -> list[str]:
    """Lines of a list: what it is about, and the text in a column of its own."""
    indent = " " * _COLUMN
    body = textwrap.wrap(" ".join(text.split()), _WIDTH, initial_indent=indent, subsequent_indent=indent)
    if len(head) > _COLUMN - 2:
        return [head, *body]
    return [head + body[0][len(head) :], *body[1:]] if body else [head]
