#!/usr/bin/env bash
# Makes (or reuses) the CPU environment and prints its path; progress goes to standard error.
# $VENV names another folder than .venv, $PYTHON another interpreter than python3 (3.11 or newer, because of the pinned
# versions; the package itself supports 3.10).
# A stamp with a hash of the requirements is written last, so it marks a complete environment.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
python=${PYTHON:-python3}
stamp=$venv/.complete

say() { echo "setup_venv: $*" >&2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { say "$python is $("$python" --version 2>&1); Python 3.11 or newer is needed"; exit 2; }

mkdir -p "$venv"
venv=$(cd "$venv" && pwd)
exec 9<"$venv"
flock 9 # on the directory itself; a second caller waits here and then finds the stamp

# The hash includes the checkout's path, because an editable installation points to it.
wanted=$({ echo "$root"; cat "$root/constraints-cpu.txt" "$root/setup.cfg"; } | sha256sum | cut -d' ' -f1)
finish() { # on standard error how to use it, on standard output the path that scripts read
    say "ready: source $venv/bin/activate"
    echo "$venv"
}

if [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    finish
    exit 0
fi

rm -f "$stamp"
[[ -x $venv/bin/python ]] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 || {
    say "making $venv"
    "$python" -m venv --clear "$venv" >&2
}
install() { # pip's own lines go to a log, whose end is shown where it fails
    "$venv/bin/python" -m pip install --disable-pip-version-check --no-input "$@" >"$venv/install.log" 2>&1 ||
        { tail -n 30 "$venv/install.log" >&2; say "pip failed; all of its output: $venv/install.log"; exit 1; }
}
say "installing torch; a minute or two in all"
install "$(grep '^torch==' "$root/constraints-cpu.txt")" # first: later ranges then take this CPU build
say "installing megatron_ettin and what its tests need"
install --editable "$root[data,deepspeed,docs,test]" --constraint "$root/constraints-cpu.txt"
echo "$wanted" >"$stamp"
finish
