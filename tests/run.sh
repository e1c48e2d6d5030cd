#!/usr/bin/env bash
# Everything a change has to pass, from a bare checkout: environment, ruff, mypy, pytest. Arguments go to pytest.
# All checks run even where an earlier one failed; the exit status is that of the worst.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

status=0
stage() { # NAME COMMAND...
    local name=$1 began=$SECONDS
    shift
    echo "== $name"
    if "$@"; then
        echo "== $name: passed in $((SECONDS - began)) s"
    else
        status=1
        echo "== $name: FAILED after $((SECONDS - began)) s"
    fi
}

began=$SECONDS
venv=$(bash tools/setup_venv.sh) || { echo "== environment: FAILED"; exit 1; }
echo "== environment: $venv, ready in $((SECONDS - began)) s"

# The tests of the cluster want a SLURM, those of chaos network namespaces; where they cannot be installed the tests say
# so and leave them out.
wanted=()
PATH=$PATH:/usr/sbin command -v slurmctld >/dev/null ||
    wanted+=(slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge)
PATH=$PATH:/usr/sbin command -v ip >/dev/null || wanted+=(iproute2)
if ((${#wanted[@]})) && [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
    began_apt=$SECONDS
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${wanted[@]}"; } \
        >"$venv/apt.log" 2>&1 || echo "== ${wanted[*]}: not installed (see $venv/apt.log); their tests are left out"
    echo "== ${wanted[*]}: $((SECONDS - began_apt)) s"
fi
# The tests of the report's page want a Chromium, of which the download is large: only CI installs it.
if [[ -n ${CI:-} ]] && ! command -v chromium >/dev/null && [[ $EUID -eq 0 ]] && command -v apt-get >/dev/null; then
    began_apt=$SECONDS
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends chromium fonts-dejavu-core; } \
        >>"$venv/apt.log" 2>&1 || echo "== chromium: not installed (see $venv/apt.log)"
    echo "== chromium: $((SECONDS - began_apt)) s"
fi

stage ruff "$venv/bin/ruff" check .
stage mypy "$venv/bin/mypy"
# Jobs on the cluster, pages, releases, whole runs and files wait more than they compute: their tests run one after another beside all
# others, where all are asked for.
BESIDE=(tests/launch tests/docs tests/report tests/chaos tests/release tests/gpu tests/data tests/emulated_te)
pytest() {
    local argument
    for argument in "$@"; do
        [[ $argument == -* ]] || { "$venv/bin/python" -m pytest "$@"; return; }
    done
    local log beside failed=0
    log=$(mktemp)
    "$venv/bin/python" -m pytest "${BESIDE[@]}" "$@" >"$log" 2>&1 &
    beside=$!
    trap 'kill $beside; exit 130' INT TERM
    "$venv/bin/python" -m pytest "${BESIDE[@]/#/--ignore=}" "$@" || failed=1
    wait $beside || failed=1
    trap - INT TERM
    echo "== ${BESIDE[*]}, run beside them"
    cat "$log" && rm "$log"
    return $failed
}

stage pytest pytest "$@"
echo "== all stages: $SECONDS s, exit $status"
exit "$status"
