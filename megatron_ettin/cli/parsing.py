"""How command lines are read: by argparse, with mistakes told in one line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from megatron_ettin.config.errors import UserError

INTERMIXED = ("train", "plan", "bench")  # key=value words may stand before and after options


class OneLineParser(argparse.ArgumentParser):
    """Tells a mistake in one line like every other one; `--help` has the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (`{self.prog} --help` shows the options)")


def parse_words(parser: argparse.ArgumentParser, command: str, words: Sequence[str]) -> argparse.Namespace:
    """Parse what follows the command's name. Raises UserError."""
    # argparse cannot do both intermixed words and subcommands
    return parser.parse_intermixed_args(words) if command in INTERMIXED else parser.parse_args(words)


def words_of(parser: argparse.ArgumentParser, args: argparse.Namespace, leave_out: Sequence[str]) -> list[str]:
    """The words that parse to `args`: options that are not at their default, then the rest. `leave_out`: names of
    attributes."""
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
