"""Completion for bash, zsh and fish: commands, options, sizes, objectives, phases, `group.key=` and its values, what
follows `ettin launch ... --`. Prints the shell's script, which asks `ettin` at each press of TAB and never grows old.

  ettin completion bash > ~/.local/share/bash-completion/completions/ettin
  ettin completion zsh > ~/.zfunc/_ettin                  # in .zshrc before compinit: fpath+=~/.zfunc
  ettin completion fish > ~/.config/fish/completions/ettin.fish
For this shell only: eval "$(ettin completion bash)"
"""

from __future__ import annotations

import argparse

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
    parser.add_argument("shell", choices=tuple(SCRIPTS), help="whose script to print")


def run(args: argparse.Namespace) -> int:
    print(SCRIPTS[args.shell], end="")
    return 0
