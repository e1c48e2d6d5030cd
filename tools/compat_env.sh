#!/usr/bin/env bash
# Makes (or reuses) an environment with another transformers than the project's and prints the path of its python.
#   oldest    the lower bound of setup.cfg
#   newest    the version that constraints-cpu.txt pins
#   latest    the newest that setup.cfg allows; every call asks the package index
#   4.57      the last release of a series; 4.57.1 is that release
# Each also gets the matching sentence-transformers and the dependencies of both. Torch and its dependencies are links
# to the project's environment, so that no gigabyte is installed. No other package of that environment is linked, because
# packages for one transformers may not import under another. The links are in a folder that comes after the
# environment's own packages, in which pip replaces nothing.
# $PYTHON names the python to build on (default: that of .venv). Progress goes to standard error.
# Exit status: 69 if no package index answers, 1 if an installation fails for another reason.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
say() { echo "compat_env: $*" >&2; }
bound() { sed -n "s/^ *transformers *>= *\([0-9.]*\), *< *\([0-9.]*\)$/\\$1/p" "$root/setup.cfg"; }
pinned() { sed -n "s/^transformers==//p" "$root/constraints-cpu.txt"; }

[[ $# -eq 1 ]] || { say "give one of: oldest newest latest VERSION"; exit 2; }
case $1 in # what CI uses is pinned, what the nightly checks use is not
oldest) wanted=("transformers==$(bound 1)$([[ $(bound 1) == *.*.* ]] || echo .0)" "sentence-transformers==5.7.0") ;;
newest) wanted=("transformers==$(pinned)" "sentence-transformers==6.2.0") ;;
latest) wanted=("transformers>=$(bound 1),<$(bound 2)" sentence-transformers) ;;
[0-9].[0-9]*.*) wanted=("transformers==$1" sentence-transformers) ;;
[0-9].[0-9]*) wanted=("transformers==$1.*" sentence-transformers) ;;
*) say "$1: give one of: oldest newest latest VERSION"; exit 2 ;;
esac

python=${PYTHON:-$root/.venv/bin/python}
torch=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))') ||
    { say "$python: has no torch; run tools/setup_venv.sh first"; exit 2; }

env=$root/.venv/compat/$1 # ignored by git, and gone with the environment it stands on
mkdir -p "$env"
exec 9<"$env"
flock 9 # a second caller waits here and then finds the stamp
stamp=$env/.complete
asked=$({ echo "${wanted[*]} $python $torch"; cat "${BASH_SOURCE[0]}" "$root/constraints-cpu.txt"; } | sha256sum | cut -d' ' -f1)
if [[ $1 != latest && -f $stamp && $(<"$stamp") == "$asked" ]]; then
    echo "$env/bin/python"
    exit 0
fi

rm -rf "$stamp" "${env:?}"/{behind,bin,include,lib,lib64,pyvenv.cfg}
"$python" -m venv --without-pip "$env" >&2
echo "$env/behind" >"$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/behind.pth"
mkdir "$env/behind"
"$python" - "$env/behind" <<'EOF'
import importlib.metadata as metadata, pathlib, re, sys

wanted, linked = ["torch"], set()
while wanted:
    name = wanted.pop()
    if name in linked:
        continue
    linked.add(name)
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        continue  # for another system or Python
    for top in {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}:
        link = pathlib.Path(sys.argv[1], top)
        if not link.is_symlink():  # several distributions may share a folder
            link.symlink_to(found.locate_file(top))
    needs = [one for one in found.requires or [] if "extra ==" not in one]
    wanted += [re.match(r"[\w.-]+", one)[0].lower() for one in needs]
    wanted += ["numpy"]  # torch's only where it is there, and large
EOF
echo "torch==$torch" >"$env/constraints.txt"
say "installing ${wanted[*]}"
if ! "$python" -m pip --python "$env/bin/python" install --disable-pip-version-check --no-input --no-compile --upgrade \
    --retries 1 --constraint "$env/constraints.txt" "${wanted[@]}" >"$env/install.log" 2>&1; then
    if [[ ${PIP_NO_INDEX:-} ]] || grep -qE 'Retrying \(|NewConnectionError|NameResolutionError|ProxyError' "$env/install.log"; then
        say "no package index answers, so ${wanted[0]} cannot be installed (all of pip's output: $env/install.log)"
        exit 69
    fi
    tail -n 30 "$env/install.log" >&2
    say "pip failed; all of its output: $env/install.log"
    exit 1
fi
echo "$asked" >"$stamp"
echo "$env/bin/python"
