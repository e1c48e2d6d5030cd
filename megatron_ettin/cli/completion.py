"""Print the completion script for bash, zsh or fish.

It completes commands, options, sizes, objectives, phases, `group.key=` and its values, and the command after `ettin
launch ... --`. The script calls `ettin` at each press of TAB, so it need not be printed again after an update.

  ettin completion bash > ~/.local/share/bash-completion/completions/ettin
  ettin completion zsh > ~/.zfunc/_ettin                  # in .zshrc before compinit: fpath+=~/.zfunc
  ettin completion fish > ~/.config/fish/completions/ettin.fish
For this shell only: eval "$(ettin completion bash)"

The scripts call `ettin __complete WORD...`, which prints a candidate per line, with a tab before its meaning. It takes
a tenth of a second. Scripts of shtab complete neither the command after `ettin launch ... --` nor the values of keys
(bash splits words at `=`), and are out of date with each new key.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_ettin.cli.main import COMMANDS
from megatron_ettin.cli.parsing import OneLineParser
from megatron_ettin.config.recipe import PHASES
from megatron_ettin.config.schema import all_keys, key_types
from megatron_ettin.config.tables import OBJECTIVES, SIZES

BASH = r"""# bash completion of ettin; made by `ettin completion bash`
_ettin() {
    local line="${COMP_LINE:0:COMP_POINT}" current cut offer files="" words=()
    # not COMP_WORDS: bash cuts words at = and :
    read -ra words <<<"$line"
    [[ "$line" == *[[:space:]] ]] && words+=("")
    current="${words[${#words[@]}-1]}"
    # what readline does not replace: all up to the last = or :
    cut=""
    [[ "$COMP_WORDBREAKS" == *"="* && "$current" == *=* ]] && cut="${current%"${current##*=}"}"
    [[ "$COMP_WORDBREAKS" == *":"* && "${current#"$cut"}" == *:* ]] && cut="${current%"${current##*:}"}"
    COMPREPLY=()
    while IFS=$'\t' read -r offer _; do
        if [[ "$offer" == ":files" ]]; then
            files=1
        elif [[ -n "$offer" ]]; then
            COMPREPLY+=("${offer#"$cut"}")
        fi
    done < <("${words[0]}" __complete "${words[@]:1}" 2>/dev/null)
    if [[ -n "$files" ]]; then
        compopt -o filenames 2>/dev/null
        while IFS= read -r offer; do
            COMPREPLY+=("$offer")
        done < <(compgen -f -- "${current##*=}")
    elif [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[.=] ]]; then
        compopt -o nospace 2>/dev/null
    fi
}
complete -F _ettin ettin
"""

ZSH = r"""#compdef ettin
# zsh completion of ettin; made by `ettin completion zsh`
_ettin() {
    local line offer meaning files=0
    local -a open closed
    while IFS=$'\t' read -r offer meaning; do
        [[ -z "$offer" ]] && continue
        if [[ "$offer" == ":files" ]]; then
            files=1
            continue
        fi
        line="${offer//:/\\:}"
        [[ -n "$meaning" ]] && line+=":$meaning"
        if [[ "$offer" == *[.=] ]]; then
            open+=("$line")
        else
            closed+=("$line")
        fi
    done < <("${words[1]}" __complete "${(@Q)words[2,CURRENT]}" 2>/dev/null)
    if (( files )); then
        [[ "$PREFIX" == *=* ]] && compset -P '*='
        _files
        return
    fi
    (( ${#open} )) && _describe -V 'ettin' open -S ''
    (( ${#closed} )) && _describe -V 'ettin' closed
}
if [[ "$funcstack[1]" == "_ettin" ]]; then
    _ettin "$@"
else
    compdef _ettin ettin
fi
"""

FISH = r"""# fish completion of ettin; made by `ettin completion fish`
function __ettin_offers
    set -l words (commandline --cut-at-cursor --tokenize)
    set -l current (commandline --cut-at-cursor --current-token)
    set -l offers ($words[1] __complete $words[2..-1] "$current" 2>/dev/null)
    if test "$offers[1]" = ":files"
        if string match --quiet -- "*=*" "$current"
            set -l parts (string split --max 1 --right -- = "$current")
            for file in (__fish_complete_path "$parts[2]")
                printf '%s=%s\n' $parts[1] $file
            end
        else
            __fish_complete_path "$current"
        end
        return
    end
    printf '%s\n' $offers
end
complete --command ettin --no-files --arguments '(__ettin_offers)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="shell whose script to print")


def run(args: argparse.Namespace) -> None:
    """Print the completion script of a shell."""
    print(SCRIPTS[args.shell], end="")


# printed line that asks the shell to offer files, for the whole word or for the part after a key's `=`
FILES = ":files"

# candidate -> its meaning
Offers = dict[str, str]

# values of options for which argparse has no choices
VALUES: dict[str, tuple[str, ...]] = {
    "--size": tuple(SIZES),
    "--objective": tuple(OBJECTIVES),
    "--phase": (*PHASES, "all"),
    "--gpu": ("h100-sxm", "h100-pcie", "h200", "b200", "a100", "l40s", "cpu"),
}
# options that take a key -> the text after the key
KEY_OPTIONS = {"--sweep": "=", "--allow-change": ""}
# metavars of options and arguments that are paths but are parsed as text
FILE_NAMES = ("DATASET", "INPUT", "PATH", "DIR|NAME", "JOB|RUN", "[NAME=]DATASET")


def print_offers(typed: Sequence[str]) -> int:
    """Print the candidates for the last of the words after `ettin`, which may be incomplete, and return 0."""
    for word, meaning in offers(list(typed) or [""]).items():
        sys.stdout.write(f"{word}\t{meaning}\n" if meaning else f"{word}\n")
    return 0


def offers(typed: list[str]) -> Offers:
    """Return the candidates for the last of the words after `ettin`, with their meanings; empty if there are none."""
    command, *rest = typed
    if not rest:
        commands = {name: summary for name, (_, summary) in COMMANDS.items()}
        return _starting_with(command, {**commands, "--help": "", "--version": "with commit and what it stands on"})
    if command not in COMMANDS:
        return {}
    if command == "launch" and "--" in rest[:-1]:
        inner = rest[rest.index("--") + 1 :]
        return offers(inner) if len(inner) > 1 else _starting_with(inner[0], {"train": "", "bench": ""})
    module = importlib.import_module(f"megatron_ettin.cli.{COMMANDS[command][0]}")
    parser: argparse.ArgumentParser = OneLineParser(prog=f"ettin {command}")
    module.add_arguments(parser)
    return _parser_offers(parser, rest)


def _parser_offers(parser: argparse.ArgumentParser, typed: list[str]) -> Offers:
    options = {name: action for action in parser._actions for name in action.option_strings}
    positional = [action for action in parser._actions if not action.option_strings]
    # waiting: the option whose value comes next; seen: positional words before the last one
    current, waiting, seen = typed[-1], None, 0
    for number, word in enumerate(typed[:-1]):
        if word in options:
            waiting = options[word] if options[word].nargs != 0 else None
        elif waiting is not None and waiting.nargs not in ("+", "*"):
            waiting = None
        elif waiting is None:
            for action in positional:
                if isinstance(action, argparse._SubParsersAction) and word in action.choices:
                    return _parser_offers(action.choices[word], typed[number + 1 :])
            seen += 1
    if current.startswith("-"):
        name, equals, value = current.partition("=")
        if equals and name in options:
            values = _values(options[name], value)
            return values if FILES in values else {f"{name}={word}": text for word, text in values.items()}
        return _starting_with(
            current, {name: action.help or "" for name, action in options.items() if name[:2] == "--"}
        )
    if waiting is not None:
        return _values(waiting, current)
    return _values(positional[min(seen, len(positional) - 1)], current) if positional else {}


def _values(action: argparse.Action, current: str) -> Offers:
    name = action.option_strings[0] if action.option_strings else ""
    if isinstance(action, argparse._SubParsersAction):
        helps = {one.dest: one.help or "" for one in action._choices_actions}
        return _starting_with(current, {choice: helps.get(choice, "") for choice in action.choices})
    if action.choices is not None:
        return _starting_with(current, dict.fromkeys(map(str, action.choices), ""))
    if name in VALUES:
        return _starting_with(current, dict.fromkeys(VALUES[name], ""))
    if name in KEY_OPTIONS:
        return _keys(current, KEY_OPTIONS[name])
    if "key=value" in str(action.metavar):
        return _keys(current, "=")
    metavars = action.metavar if isinstance(action.metavar, tuple) else (action.metavar,)
    return {FILES: ""} if action.type is Path or set(metavars) & set(FILE_NAMES) else {}


def _keys(current: str, after: str) -> Offers:
    """Return candidates for `group.`, then `group.key=`, then the key's values, also after a phase such as `extend.`.

    `after` is the text that follows a key: `=`, or empty for an option that takes only the key.
    """
    first, dot, rest = current.partition(".")
    if dot and first in PHASES:
        keys = _keys(rest, after)
        return keys if FILES in keys else {f"{first}.{word}": text for word, text in keys.items()}
    name, equals, value = current.partition("=")
    types = key_types()
    if equals:
        key = all_keys().get(name)
        if key is not None and key.path:
            return {FILES: ""}
        allowed = ("true", "false") if types.get(name) is bool else key.choices if key is not None else ()
        return {f"{name}={word}": "" for word in allowed if word.startswith(value)}
    if not dot:
        groups = dict.fromkeys(f"{name.partition('.')[0]}." for name in types if name.startswith(current))
        if len(groups) != 1:
            return dict.fromkeys(groups, "")
        current = next(iter(groups))
    return {f"{name}{after}": all_keys()[name].doc for name in types if name.startswith(current)}


def _starting_with(start: str, candidates: Offers) -> Offers:
    """Return the candidates that begin with `start`, with the first line of their meanings."""
    return {
        word: text.partition("\n")[0].replace(" (%(default)s)", "")
        for word, text in candidates.items()
        if word.startswith(start)
    }
