"""Parse command lines by argparse, and report mistakes in one line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from megatron_ettin.base.errors import UserError, nearest

# commands whose key=value overrides may stand before and after options
INTERMIXED = ("train", "plan", "bench")


class OneLineParser(argparse.ArgumentParser):
    """Raise UserError with one line for a mistake; `--help` has the usage."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        if unknown != message:
            message = unknown_words(unknown.split(" "), options_of(self), takes_keys(self))
        raise UserError(f"{message} (`{self.prog} --help` shows the options)")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Check a value as argparse does, and suggest the nearest choice."""
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            message = f"{value!r} does not exist{nearest(str(value), choices)}; it is one of {', '.join(choices)}"
            raise argparse.ArgumentError(action, message)


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """Return every option of a parser and of its subparsers."""
    options: list[str] = []
    for action in parser._actions:
        options += action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            options += [option for inner in action.choices.values() for option in options_of(inner)]
    return list(dict.fromkeys(options))


def takes_keys(parser: argparse.ArgumentParser) -> bool:
    """Return whether the command takes group.key=value overrides."""
    return any("key=value" in str(action.metavar) for action in parser._actions)


def unknown_words(words: Sequence[str], options: Sequence[str], keys: bool) -> str:
    """Return a message about words that no option takes: the first one that looks like an option, else all."""
    for word in words:
        name = word.partition("=")[0]
        if not name.startswith("-") or name == "-":
            continue
        bare = name.lstrip("-")
        if keys and "." in bare:
            return f"unknown option {name}; keys are written without dashes: {bare}={word.partition('=')[2]}"
        meant = (_key_named(bare) if keys else "") or nearest(name, options)
        return f"unknown option {name}{meant}"
    return f"too many words: {' '.join(words)}"


def _key_named(name: str) -> str:
    """Return a hint for an option that is a key here, such as `--learning-rate`."""
    from megatron_ettin.config.key_names import same_name
    from megatron_ettin.config.schema import key_types

    found = same_name(name, key_types())
    return f" (did you mean {found + '='!r}?)" if found else ""


def parse_overrides(parser: argparse.ArgumentParser, command: str, words: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments after the command's name. Raises UserError."""
    # argparse cannot do both intermixed words and subcommands
    return parser.parse_intermixed_args(words) if command in INTERMIXED else parser.parse_args(words)


def format_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace, leave_out: Sequence[str]) -> list[str]:
    """Return the words that parse to `args`: options that are not at their default, then positional ones.

    Args:
        parser: the parser of the command.
        args: what the parser returned.
        leave_out: attributes of `args` to skip.
    """
    options: list[str] = []
    rest: list[str] = []
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in (*leave_out, "help") or value == action.default or value in (None, []):
            continue
        if not action.option_strings:
            rest += [str(word) for word in value]
        elif action.nargs == 0:
            options.append(action.option_strings[0])
        else:
            for item in value if isinstance(value, list) else [value]:
                options += [action.option_strings[0], str(item)]
    return options + rest
