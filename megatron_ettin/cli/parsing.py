"""Parse command lines with argparse, and report mistakes in one line. `SHARED` has the options that commands share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_ettin.base.errors import UserError, nearest

# commands that accept key=value overrides before, between and after their options
INTERMIXED = ("train", "plan", "bench")


# argparse settings of options that several commands have; a command may override them
SHARED: dict[str, dict[str, Any]] = {
    "--size": {"help": "17m 32m 68m 150m 400m 1b"},
    "--config": {"type": Path, "metavar": "YAML", "help": "a user config, as for `ettin train`"},
    "--sweep": {"action": "append", "default": [], "metavar": "KEY=V1,V2"},
    "--dtype": {"choices": ("float32", "bfloat16", "fp32", "bf16")},
    "--max-shard-bytes": {"default": "5B", "metavar": "N", "help": "largest safetensors file (%(default)s)"},
    "--json": {"action": "store_true", "help": "print the result as JSON"},
    "overrides": {"nargs": "*", "metavar": "key=value", "help": "overrides, as for `ettin train`"},
}


class OneLineParser(argparse.ArgumentParser):
    """Argument parser that raises UserError with one line for a mistake, without the usage."""

    def add_argument(
        self, *names: Any, at_least: int | None = None, above: int | None = None, **settings: Any
    ) -> argparse.Action:
        """Add an option, with the settings that `SHARED` has for it unless `settings` overrides them.

        Args:
            names: its names, as for argparse.
            at_least: smallest allowed value of a number.
            above: a number must be finite and greater than this.
            settings: other settings of argparse.
        """
        action = super().add_argument(*names, **SHARED.get(names[0], {}) | settings)
        vars(action).update(at_least=at_least, above=above)
        return action

    def error(self, message: str) -> NoReturn:
        """Raise UserError with argparse's message, and a hint if the mistake is an unknown option."""
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message = unknown_arguments(unknown.split(" "), options_of(self), takes_keys(self))
        raise UserError(f"{message} (`{self.prog} --help` shows the options)")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Return an argument converted to its type. Raises UserError if a number is outside its option's bounds."""
        value = super()._get_value(action, arg_string)
        at_least, above = (getattr(action, bound, None) for bound in ("at_least", "above"))
        wrong = None
        if at_least is not None and value < at_least:
            wrong = f"at least {at_least}"
        elif above is not None and not value > above:
            wrong = f"above {above}"
        elif above is not None and not math.isfinite(value):
            wrong = "finite"
        if wrong is not None:
            raise UserError(f"{action.option_strings[0]} {arg_string}: must be {wrong}")
        return value

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Raise ArgumentError for a value that is not a choice, as argparse does, and suggest the nearest choice."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            message = f"{value!r} does not exist{nearest(str(value), choices)}; it is one of {', '.join(choices)}"
            raise argparse.ArgumentError(action, message)


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return the names of all options of a parser and of its subparsers."""
    options: list[str] = []
    for action in parser._actions:
        options += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            options += [option for inner in action.choices.values() for option in options_of(inner)]
    return list(dict.fromkeys(options))


def takes_keys(parser: argparse.ArgumentParser) -> bool:
    """Return whether a command's parser takes `group.key=value` overrides."""
    return any("key=value" in str(action.metavar) for action in parser._actions)


def unknown_arguments(arguments: Sequence[str], options: Sequence[str], keys: bool) -> str:
    """Return a message that names the first unknown argument that looks like an option, or else all arguments.

    Args:
        arguments: the arguments that argparse did not recognize.
        options: names of the command's options.
        keys: whether the command takes `group.key=value` overrides.
    """
    for argument in arguments:
        name, _, value = argument.partition("=")
        if not name.startswith("-") or name == "-":
            continue
        bare = name.lstrip("-")
        if keys and "." in bare:
            return f"unknown option {name}; keys are written without dashes: {bare}={value}"
        hint = ""
        if keys:
            from megatron_ettin.config.key_names import same_name
            from megatron_ettin.config.schema import key_types

            # the user may have written a key as an option, such as `--learning-rate`
            key = same_name(bare, key_types())
            hint = f" (did you mean {key + '='!r}?)" if key else ""
        return f"unknown option {name}{hint or nearest(name, options)}"
    return f"too many words: {' '.join(arguments)}"


def parse_arguments(parser: argparse.ArgumentParser, command: str, arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments after the command's name. Raises UserError."""
    # not for every command, because argparse cannot parse intermixed overrides together with subcommands
    return parser.parse_intermixed_args(arguments) if command in INTERMIXED else parser.parse_args(arguments)


def format_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace, leave_out: Sequence[str]) -> list[str]:
    """Return a command line that parses to `args`: options that differ from their default, then positional arguments.

    Args:
        parser: the parser of the command.
        args: the parsed arguments.
        leave_out: attributes of `args` to skip.
    """
    options: list[str] = []
    rest: list[str] = []
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in (*leave_out, "help") or value == action.default or value in (None, []):
            continue
        if not action.option_strings:
            rest += [str(override) for override in value]
        elif action.nargs == 0:
            options.append(action.option_strings[0])
        else:
            for item in value if isinstance(value, list) else [value]:
                options += [action.option_strings[0], str(item)]
    return options + rest
