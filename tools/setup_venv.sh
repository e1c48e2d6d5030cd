#!/usr/bin/env bash
# Makes the CPU environment (or re-uses it) and prints its path; what it does meanwhile goes to standard error.
# $VENV names another place than .venv, $PYTHON another interpreter than python3 (3.10 or newer).
# A stamp with the hash of what was asked for tells a complete environment from one whose installation was cut off.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${VENV:-$root/.venv}
python=${PYTHON:-python3}
stamp=$venv/.complete

say() { echo "setup_venv: $*" >&2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { say "$python is $("$python" --version 2>&1); Python 3.10 or newer is needed"; exit 2; }

mkdir -p "$venv"
venv=$(cd "$venv" && pwd)
exec 9<"$venv"
flock 9 # on the directory itself; a second caller waits here and then finds the stamp

# The checkout's path counts: an editable installation points to it.
wanted=$({ echo "$root"; cat "$root/constraints-cpu.txt" "$root/setup.cfg"; } | sha256sum | cut -d' ' -f1)
if [[ -x $venv/bin/python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
    echo "$venv"
    exit 0
fi

rm -f "$stamp"
[[ -x $venv/bin/python ]] && "$venv/bin/python" -m pip --version >/dev/null 2>&1 || {
    say "making $venv"
    "$python" -m venv --clear "$venv" >&2
}
pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input)
say "installing torch"
"${pip[@]}" "$(grep '^torch==' "$root/constraints-cpu.txt")" >&2 # first: later ranges then take this CPU build
say "installing megatron_ettin and its tests' needs"
"${pip[@]}" --editable "$root[data,test]" --constraint "$root/constraints-cpu.txt" >&2
echo "$wanted" >"$stamp"
echo "$venv"
