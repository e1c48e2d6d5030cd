#!/usr/bin/env bash
# Check a change, from a bare checkout: environment, ruff, codespell, mypy, pytest. tests/README.md describes the tiers.
#
#   bash tests/run.sh                   the first tier, in minutes: run it before each commit
#   bash tests/run.sh --all             every test that belongs to a commit
#   bash tests/run.sh --rest            what --all runs beyond the first tier
#   bash tests/run.sh tests/report -k page    these tests, of both tiers; words that are not listed here go to pytest
#
#   --install-system   install Debian packages that some tests need (SLURM, Chromium, iproute2); CI=true does it too
#   --coverage         measure and print the lines of the package that the tests run, over all their processes
#
# WORKERS is the number of test processes, by default half of the processors and at least 2. All checks run, even if
# an earlier one failed; the exit status is 1 if any failed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

tier=first coverage='' install=${CI:-} words=() chosen=''
for word in "$@"; do
    case $word in
    --all) tier=all ;;
    --rest) tier=full ;;
    --coverage) coverage=1 ;;
    --install-system) install=1 ;;
    --help | -h) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *)
        words+=("$word")
        [[ $word == -* ]] || chosen=1
        ;;
    esac
done
[[ -z $chosen ]] || tier=all # whoever names tests wants those

status=0
finish() { # NAME STATUS SECONDS
    if (($2 == 0)); then
        echo "== $1: passed in $3 s"
    else
        status=1
        echo "== $1: FAILED after $3 s"
    fi
}

began=$SECONDS
venv=$(bash tools/setup_venv.sh) || { echo "== environment: FAILED"; exit 1; }
echo "== environment: $venv, ready in $((SECONDS - began)) s"

has() { PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null; }
packages=() left_out=()
want() { # PROGRAM TESTS PACKAGE...: unless the program is there
    has "$1" && return
    left_out+=("$2")
    packages+=("${@:3}")
}
want slurmctld "jobs on SLURM" slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge
want chromium "pages in a browser" chromium fonts-dejavu-core
want ip "faults of the network" iproute2
if ((${#packages[@]})) && [[ -n $install && $EUID -eq 0 ]] && has apt-get; then
    began=$SECONDS
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${packages[@]}"; } \
        >"$venv/apt.log" 2>&1 || { echo "== system packages: FAILED (see $venv/apt.log)"; status=1; }
    echo "== system packages: ${packages[*]}, $((SECONDS - began)) s"
elif ((${#packages[@]})); then
    list=$(printf ', %s' "${left_out[@]}")
    echo "== left out: tests of ${list:2}; as root, \`bash tests/run.sh --install-system\` installs ${packages[*]}"
fi

lint() { # beside the tests, which wait now and then
    local failed=0
    "$venv/bin/ruff" check . || failed=1
    "$venv/bin/ruff" format --check . || failed=1
    "$venv/bin/codespell" || failed=1
    "$venv/bin/mypy" || failed=1
    return $failed
}

processors=$(nproc)
workers=${WORKERS:-$((processors > 5 ? processors / 2 : 2))}
pytest=("$venv/bin/python" -m pytest --tier "$tier")
[[ -n $chosen ]] || pytest+=(-n "$workers")
if [[ -n $coverage ]]; then
    export COVERAGE_FILE=$PWD/build/coverage/$tier COVERAGE_RCFILE=$PWD/setup.cfg
    rm -rf "$COVERAGE_FILE"* && mkdir -p build/coverage
    pytest=("$venv/bin/python" -m coverage run -m "${pytest[@]:2}")
fi

lint_log=$(mktemp)
if [[ -z $chosen && $tier != full ]]; then
    (began=$SECONDS; lint >"$lint_log" 2>&1; code=$?; echo "$((SECONDS - began))" >"$lint_log.seconds"; exit $code) &
    linting=$!
    trap 'kill "$linting" 2>/dev/null; exit 130' INT TERM
fi
case $tier in
first) echo "== pytest, first tier: six to ten minutes on two cores" ;;
all) [[ -n $chosen ]] || echo "== pytest, every test: some twenty-five minutes on two cores" ;;
esac
began=$SECONDS
"${pytest[@]}" ${words[@]+"${words[@]}"}
code=$?
seconds=$((SECONDS - began))
if [[ -n ${linting:-} ]]; then
    wait "$linting"
    lint_code=$?
    trap - INT TERM
    echo "== ruff, codespell, mypy"
    cat "$lint_log"
    finish "ruff, codespell, mypy" "$lint_code" "$(<"$lint_log.seconds")"
fi
rm -f "$lint_log" "$lint_log.seconds"
drop_damaged() { # FILE...: what a process that was killed meanwhile has half written; one ends `coverage combine`
    "$venv/bin/python" - "$@" <<'END'
import contextlib, os, sqlite3, sys
for name in filter(os.path.exists, sys.argv[1:]):
    found = None
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(name)) as data:
        found = data.execute("pragma quick_check").fetchone()
    if found != ("ok",):
        os.remove(name)
        print(f"== coverage: one process's lines are lost, it was killed while it wrote them ({os.path.basename(name)})")
END
}
if [[ -n $coverage ]]; then
    drop_damaged "$COVERAGE_FILE".*
    "$venv/bin/python" -m coverage combine -q
    echo "== coverage, tier $tier: $("$venv/bin/python" -m coverage report --format=total) % of the package's lines"
fi
finish pytest "$code" "$seconds"
echo "== all stages: $SECONDS s, exit $status"
exit "$status"
