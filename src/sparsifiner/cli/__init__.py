"""The command line: options become dataclasses, a command is a function."""

import dataclasses
import inspect
import logging
import re
import sys
from argparse import SUPPRESS
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from docstring_parser import parse
from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from sparsifiner.choices import Choices
from sparsifiner.cli.bench import bench_model, bench_ops
from sparsifiner.cli.calibrate import calibrate
from sparsifiner.cli.choices import PARSER_MODE, HelpFormatter, join_choices, list_choices
from sparsifiner.cli.commands import demo, evaluate, info, macs, train
from sparsifiner.cli.compare import compare
from sparsifiner.measure.parity import ParityError
from sparsifiner.version import __version__

Command = Callable[..., None]
COMMANDS: dict[str, Command | dict[str, Command]] = {
    "bench": {"model": bench_model, "ops": bench_ops},
    "calibrate": calibrate,
    "compare": compare,
    "demo": demo,
    "eval": evaluate,
    "info": info,
    "macs": macs,
    "train": train,
}
_GROUP_HELP = {"bench": "Times operations or whole models, sparse against dense."}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: the command line without the program's name, `sys.argv` by default.

    Returns:
        The exit code: 0, 2 after an error of the user's, or 1 where a backend is not what the reference is;
        errors are printed in one line.
    """
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("sparsifiner").setLevel(logging.INFO)
    given = sys.argv[1:] if arguments is None else arguments
    parser = _make_parser()
    words = _join_lists([_with_underscores(argument) for argument in given])
    options = parser.parse_args(join_choices(words))
    try:
        command, chosen = _choose(COMMANDS, parser.instantiate(options))
        command(**_bind(command, chosen))
    except ParityError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _make_parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="sparsifiner",
        description="Vision Transformers that attend only to the token pairs that matter for this image.",
        epilog="Options may be written with dashes or underscores.",
    )
    parser.add_argument("--version", action="version", version=f"sparsifiner {__version__}")
    _add_commands(parser, COMMANDS)
    return parser


def _add_commands(parser: ArgumentParser, commands: Mapping[str, Command | Mapping[str, Command]]) -> None:
    subcommands = parser.add_subcommands()
    for name, function in commands.items():
        if not callable(function):
            group_parser = ArgumentParser(description=_GROUP_HELP[name])
            subcommands.add_subcommand(name, group_parser, help=_GROUP_HELP[name])
            _add_commands(group_parser, function)  # the outer level must know it first
            continue
        summary = (inspect.getdoc(function) or "").partition("\n")[0]
        groups = _option_groups(function)
        command = _command_parser(summary, groups)
        command.add_argument("--config", action="config", help="YAML file of these options")
        for group in groups.values():
            command.add_class_arguments(group, skip=_flags(group))
            _add_flags(command, group)
        command.add_function_arguments(function, skip={*groups, *_flags(function)})
        _add_flags(command, function)
        subcommands.add_subcommand(name, command, help=summary)
        if command.epilog:  # both would be the outer parser's
            command.formatter_class, command.parser_mode = HelpFormatter, PARSER_MODE


def _command_parser(summary: str, groups: Mapping[str, Any]) -> ArgumentParser:
    """A parser that knows choices, and the old flags that the groups have."""
    choices = {name: each for group in groups.values() for name, each in _choices_of(group).items()}
    if not choices:
        return ArgumentParser(description=summary)
    command = ArgumentParser(
        description=summary,
        epilog=list_choices(choices),
    )
    for flag, hint in (old for group in groups.values() for old in _old_flags(group).items()):
        if hint is bool:
            command.add_argument(f"--{flag}", action="store_true", help=SUPPRESS)
        else:
            command.add_argument(f"--{flag}", type=hint, default=None, help=SUPPRESS)
    return command


def _choices_of(group: Any) -> dict[str, Choices[Any]]:
    choices: dict[str, Choices[Any]] = getattr(group, "CHOICES", {})
    return choices


def _old_flags(group: Any) -> dict[str, Any]:
    flags: dict[str, Any] = getattr(group, "OLD_FLAGS", {})
    return flags


def _choose(
    commands: Mapping[str, Command | Mapping[str, Command]], options: Namespace
) -> tuple[Command, Namespace]:
    """The command that was given, and its options."""
    chosen, own = commands[options.subcommand], options[options.subcommand]
    return (chosen, own) if callable(chosen) else _choose(chosen, own)


def _option_groups(function: Callable[..., None]) -> dict[str, Any]:
    """Parameters that are dataclasses: their fields are options of the command."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.annotation for p in parameters if dataclasses.is_dataclass(p.annotation)}


def _flags(source: Callable[..., Any]) -> set[str]:
    """Parameters that are switches: given or not, without a value."""
    return {p.name for p in inspect.signature(source).parameters.values() if p.annotation is bool}


def _add_flags(parser: ArgumentParser, source: Callable[..., Any]) -> None:
    documented = {entry.arg_name: entry.description or "" for entry in parse(source.__doc__ or "").params}
    for name in sorted(_flags(source)):
        text = " ".join(documented[name].split()).rstrip(".")
        if inspect.signature(source).parameters[name].default is True:
            parser.add_argument(f"--{name}", action=ActionYesNo, default=True, help=text)
        else:
            parser.add_argument(f"--{name}", action="store_true", help=text)


def _bind(command: Callable[..., None], options: Namespace) -> dict[str, Any]:
    """Arguments of a command from its options: groups become their dataclasses."""
    given = {key: value for key, value in vars(options).items() if key != "config"}
    arguments: dict[str, Any] = {}
    for name, group in _option_groups(command).items():
        fields = [field.name for field in dataclasses.fields(group)]
        values = {field: given.pop(field) for field in [*fields, *_old_flags(group)]}
        arguments[name] = group.of(values) if _old_flags(group) else group(**values)
    return {**arguments, **given}


def _with_underscores(argument: str) -> str:
    """`--img-size=3` as `--img_size=3`."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument[2:].partition("=")
    return f"--{name.replace('-', '_')}{equals}{value}"


def _join_lists(arguments: Sequence[str]) -> list[str]:
    """`--keep 0.5 0.1` as `--keep [0.5,0.1]`: no option takes more than one number or size otherwise."""
    joined: list[str] = []
    numbers: list[str] = []
    for argument in [*arguments, "--"]:
        if joined and joined[-1].startswith("--") and _is_number(argument):
            numbers.append(argument)
            continue
        if numbers:
            joined.append(numbers[0] if len(numbers) == 1 else f"[{','.join(numbers)}]")
            numbers = []
        joined.append(argument)
    return joined[:-1]


def _is_number(text: str) -> bool:
    """Whether it is a number, or the size of an image: "1024x2048"."""
    if re.fullmatch(r"\d+x\d+", text):
        return True
    try:
        float(text)
    except ValueError:
        return False
    return True
