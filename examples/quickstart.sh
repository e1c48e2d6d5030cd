#!/usr/bin/env bash
# From text to a released pair, on a CPU: prepare, train an encoder and a decoder through three phases on two ranks,
# evaluate, convert, load with transformers, compare. Run it again to continue where it stopped.
#
#   bash examples/quickstart.sh                 docstrings of the installed Python packages as text
#   bash examples/quickstart.sh TEXT_PATH...    text files, folders or .jsonl of your own
#
# OUT (quickstart) is where everything goes, SIZE (17m) what is trained, PERCENT (100) of the token budgets below.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-quickstart}
size=${SIZE:-17m}
percent=${PERCENT:-100}
mkdir -p "$out"

stage() { # NAME COMMAND...: a heading, the command, its seconds
    local name=$1 began=$SECONDS
    shift
    echo "== $name"
    "$@"
    echo "== $name: $((SECONDS - began)) s"
}

began=$SECONDS
echo "== environment"
venv=$(bash "$root/tools/setup_venv.sh")
export PATH="$venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two ranks, one thread each
echo "== environment: $((SECONDS - began)) s"

collect() { # sets `text`
    if [[ $# -gt 0 ]]; then
        text=("$@")
        return
    fi
    text=("$out/docstrings.jsonl")
    [[ -f ${text[0]} ]] || python "$root/examples/docstrings.py" --out "${text[0]}" --max-bytes 12000000
}

prepare() { # LENGTH: the text in chunks of at most so many tokens, a fiftieth of the documents held out
    ettin prepare "${text[@]}" --out "$out/corpus-$1" --holdout 0.02 --chunk-tokens "$1" --seq-len "$1"
}

train() { # OBJECTIVE PHASE LENGTH KILOTOKENS [KEY=VALUE | --init-from RUN]...: resumes, or does nothing when done
    local objective=$1 phase=$2 length=$3 kilotokens=$4
    shift 4
    local tokens=$((kilotokens * 10 * percent)) schedule
    case $phase in # the learning rate rises over a tenth, then falls over the last two phases
        pretrain) schedule=("schedule.warmup_tokens=$((tokens / 10))" schedule.decay_tokens=0) ;;
        *) schedule=(schedule.warmup_tokens=0 "schedule.decay_tokens=$tokens") ;;
    esac
    torchrun --nproc-per-node 2 --no-python ettin train --size "$size" --objective "$objective" --phase "$phase" \
        --config "$root/examples/quickstart.yaml" --run-dir "$out/$objective/$phase" \
        "data.mixture=$out/corpus-$length" "data.validation=$out/corpus-$length/heldout" "data.seq_len=$length" \
        "run.tokens=$tokens" "${schedule[@]}" "$@"
}

pair() { # one objective through its phases, the last two on another layout than the first
    local objective=$1
    stage "$objective pretrain, data-parallel" train "$objective" pretrain 128 1200
    stage "$objective extend, tensor-parallel" train "$objective" extend 512 300 parallel.tp=2 \
        batch.global_batch_rows=8 batch.micro_batch_rows=4 \
        --init-from "$out/$objective/pretrain"
    stage "$objective decay, tensor-parallel" train "$objective" decay 512 300 parallel.tp=2 \
        batch.global_batch_rows=8 batch.micro_batch_rows=4 \
        --init-from "$out/$objective/extend"
}

evaluate() {
    local objective
    for objective in mlm clm; do
        ettin eval "$out/$objective/decay" --data "$out/corpus-512/heldout" --baseline "$out/corpus-512" --json |
            tee "$out/$objective/eval.json"
    done
}

convert() {
    local objective
    for objective in mlm clm; do
        [[ -d $out/$objective/hf ]] || ettin convert to-hf "$out/$objective/decay" "$out/$objective/hf" --verify
    done
}

compare() {
    ettin compare "$out"/mlm/{pretrain,extend,decay} "$out"/clm/{pretrain,extend,decay} \
        --out "$out/pair.html" --require-paired
}

stage "text" collect "$@"
stage "prepare, chunks of 128 tokens" prepare 128
stage "prepare, chunks of 512 tokens" prepare 512
pair mlm
pair clm
stage "evaluate on the held-out documents" evaluate
stage "convert to Hugging Face folders" convert
stage "load with transformers" python "$root/examples/try_models.py" "$out/mlm/hf" "$out/clm/hf"
stage "compare" compare

cat <<END
== done in $((SECONDS - began)) s
datasets            $out/corpus-128  $out/corpus-512
encoder's runs      $out/mlm/{pretrain,extend,decay}   (metrics.jsonl, checkpoints/, events/ for TensorBoard)
decoder's runs      $out/clm/{pretrain,extend,decay}
held-out losses     $out/mlm/eval.json  $out/clm/eval.json
for transformers    $out/mlm/hf  $out/clm/hf
proof and curves    $out/pair.html  $out/pair.png
END
