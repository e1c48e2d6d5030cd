#!/usr/bin/env bash
# Run the checks that each commit's tests leave out, because they install much or take long. docs/nightly.md names the
# last run.
#   mds   new shards by mosaicml-streaming, in an environment of its own, read by the tests of MDS
#   ray   `ettin prepare --executor ray` compared with one process, byte for byte
#   kill  kill -9 of `ettin prepare` at 200 moments instead of 4
#   transformers  exported folders under more releases of transformers, the newest one included
#   release  kill -9 of `ettin release` at 60 moments instead of 3
#   harness  lm-evaluation-harness and mteb on exported folders, in an environment of their own
#   layouts  every layout with every option of the invariance tables (each commit: two of eight options for each)
#   fuzz  a million damaged and hostile inputs for the readers of others' files instead of 20,000
#   corrupt  600 single bytes of a dataset and a run, changed one at a time, instead of 80
#   chaos  200 whole runs of four ranks under faults instead of 7
#   cut  saves cut at every call that changes the disk instead of at some
#   emulated  100 steps in each FP8 recipe, and checkpoints between them, by Transformer Engine over emulated kernels
#   shapes  round trips of the whole 32m, 68m, 150m, 400m and 1b shapes, bit for bit, through one rank and TP 2 x PP 2
# Arguments choose stages; without any, all run. `--jobs N` before them runs N stages at a time, the longest first; what
# a stage prints then comes in one piece when it has ended.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=$(bash tools/setup_venv.sh) || exit 1
python=$venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1

mds() {
    local own=$work/mds-venv fresh=$work/mds
    # torchvision is imported and not used; three files stand for it, so that nothing of CUDA is installed
    "$venv/bin/python" -m venv "$own" &&
        "$own/bin/pip" install -q "$(grep '^torch==' constraints-cpu.txt)" &&
        "$own/bin/pip" install -q --no-deps mosaicml-streaming==0.13.0 &&
        "$own/bin/pip" install -q "numpy<2.2" "xxhash<4" zstd Brotli python-snappy tqdm requests filelock psutil boto3 \
            azure-storage-blob azure-identity azure-storage-file-datalake google-cloud-storage oci matplotlib paramiko \
            huggingface_hub catalogue cramjam "transformers<5" || return 1
    local stub
    stub=$("$own/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/torchvision
    mkdir -p "$stub/transforms" && touch "$stub/__init__.py"
    echo 'class VisionDataset: pass' >"$stub/datasets.py"
    echo 'def to_tensor(x): return x' >"$stub/transforms/functional.py"
    printf 'from . import functional\nclass ToTensor: pass\n' >"$stub/transforms/__init__.py"
    cp -r tests/fixtures/mds "$fresh" && "$own/bin/python" "$fresh/write.py" "$fresh" &&
        ETTIN_MDS_FIXTURES=$fresh "$python" -m pytest tests/prepare/test_mds.py
}

ray() {
    "$venv/bin/pip" install -q --target "$work/ray" "ray>=2.40,<3" -c constraints-cpu.txt &&
        "$python" examples/docstrings.py --out "$work/text.jsonl" &&
        "$python" -m megatron_ettin prepare "$work/text.jsonl" --out "$work/here" --workers 1 &&
        PYTHONPATH=$PWD:$work/ray "$python" -m megatron_ettin prepare "$work/text.jsonl" --out "$work/there" \
            --workers 2 --executor ray &&
        diff -r "$work/here" "$work/there" && echo "ray: the same bytes"
}

kill() { ETTIN_TEST_KILLS=200 "$python" -m pytest tests/prepare/test_prepare_faults.py -k "kill_9 or bad_line"; }

transformers() { # a skip is no pass here: the package index has to answer
    local name
    for name in 4.56 4.57 5.0 latest; do
        PYTHON=$python bash tools/compat_env.sh "$name" >/dev/null || return 1
    done
    ETTIN_COMPAT="4.56 4.57 5.0 latest" "$python" -m pytest tests/convert/compat
}

release() { ETTIN_TEST_RELEASE_KILLS=60 "$python" -m pytest tests/release/test_faults.py -k "kill_9 and real"; }

harness() {
    local own=$work/harness
    "$venv/bin/python" -m venv "$own" &&
        "$own/bin/pip" install -q "$(grep '^torch==' constraints-cpu.txt)" &&
        "$own/bin/pip" install -q --editable ".[harness]" -c constraints-cpu.txt &&
        ETTIN_HARNESS=$own/bin/python "$python" -m pytest tests/evaluate/test_harness.py
}

layouts() { ETTIN_WHOLE_TABLES=1 "$python" -m pytest tests/train/test_invariance.py tests/optim/test_deepspeed.py; }

shapes() { # 25 minutes, 17 GB of memory and of disk
    ETTIN_FULL_SHAPES="32m 68m 150m 400m" "$python" -m pytest tests/convert/test_layouts.py -k "32m or 68m or 150m or 400m" &&
        ETTIN_FULL_SHAPES=1b "$python" -m pytest tests/convert/test_full_1b.py
}

emulated() { ETTIN_EMULATED_STEPS=100 "$python" -m pytest -s tests/emulated_te/test_validate.py; }

fuzz() { "$python" -W ignore tools/fuzz.py --runs 1000000 --seed "$(date +%j)" --out "$work/fuzz-failures"; }

corrupt() { ETTIN_CORRUPTIONS=600 "$python" -m pytest tests/security/test_corruption.py -k every; }

chaos() { # an hour; a round that failed says how it is repeated
    "$python" -W ignore tools/chaos.py run --rounds 200 --seed "$(date +%j)" --work "$work/chaos"
}

cut() { # 40 minutes
    "$python" -W ignore tools/chaos.py cut --work "$work/cut" &&
        "$python" -W ignore tools/chaos.py cut --what training --work "$work/cut"
}

ALL="chaos shapes fuzz cut kill layouts emulated release harness transformers mds ray corrupt"

one_after_another() { # STAGE...
    local name began status=0
    for name in "$@"; do
        began=$SECONDS
        if "$name"; then echo "== $name: passed in $((SECONDS - began)) s"
        else status=1; echo "== $name: FAILED after $((SECONDS - began)) s"; fi
    done
    return "$status"
}

at_once() { # JOBS STAGE...
    local jobs=$1
    shift
    printf '%s\n' "$@" | xargs -P "$jobs" -I {} bash -c 'bash tests/nightly.sh {} >"$0/{}.log" 2>&1; status=$?
        cat "$0/{}.log"; exit "$status"' "$work"
}

jobs=1
if [ "${1:-}" = --jobs ]; then
    jobs=${2:-}
    [[ $jobs =~ ^[1-9][0-9]*$ ]] || { echo "nightly: --jobs ${jobs:-without a number}: a number from 1 on" >&2; exit 2; }
    shift 2
fi
[ $# -gt 0 ] || set -- $ALL
for name in "$@"; do
    [[ " $ALL " == *" $name "* ]] || { echo "nightly: $name: no stage; known: $ALL" >&2; exit 2; }
done
if [ "$jobs" = 1 ]; then one_after_another "$@"; else at_once "$jobs" "$@"; fi
status=$?
[ $# = 1 ] || echo "== nightly: $# stages in $SECONDS s"
exit $((status != 0))
