#!/usr/bin/env bash
# From text to a released pair, on a CPU: prepare, train an encoder and a decoder through three phases on two ranks,
# evaluate, convert, load with transformers, compare, report. Run it again to continue where it stopped.
#
#   bash examples/quickstart.sh                 docstrings of the installed Python packages as text
#   bash examples/quickstart.sh TEXT_PATH...    text files, folders or .jsonl of your own
#
# OUT (quickstart) is where everything goes, PERCENT (100) of the token budgets below, TOKENIZER a folder to use instead
# of the small one trained here (`ettin` is the recipe's, whose 50,368 entries want far more text than this).
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
out=${OUT:-quickstart}
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

tokenizer() { # sets `tokenizer`
    tokenizer=${TOKENIZER:-$out/tokenizer}
    [[ -n ${TOKENIZER:-} || -f $tokenizer/tokenizer_config.json ]] ||
        python "$root/examples/train_tokenizer.py" "${text[@]}" --vocab 4096 --out "$tokenizer"
}

prepare() { # LENGTH: the text in chunks of at most so many tokens, a fiftieth of the documents held out
    ettin prepare "${text[@]}" --out "$out/corpus-$1" --holdout 0.02 --chunk-tokens "$1" --seq-len "$1" \
        --tokenizer "$tokenizer" --workers 2
}

entries() { # of the vocabulary, as the dataset records it
    ettin inspect "$out/corpus-128" --json |
        python -c 'import json, sys; print(json.load(sys.stdin)["tokenizer"]["vocab_size"])'
}

train() { # OBJECTIVE PHASE LENGTH KILOTOKENS [KEY=VALUE | --init-from RUN]...: resumes, or does nothing when done
    local objective=$1 phase=$2 length=$3 kilotokens=$4
    shift 4
    local tokens=$((kilotokens * 10 * percent)) schedule
    case $phase in # the learning rate rises over a tenth, then falls over the last two phases
        pretrain) schedule=("schedule.warmup_tokens=$((tokens / 10))" schedule.decay_tokens=0) ;;
        *) schedule=(schedule.warmup_tokens=0 "schedule.decay_tokens=$tokens") ;;
    esac
    torchrun --nproc-per-node 2 --no-python ettin train --size 17m --objective "$objective" --phase "$phase" \
        --config "$root/examples/quickstart.yaml" --run-dir "$out/$objective/$phase" \
        "data.mixture=$out/corpus-$length" "data.validation=$out/corpus-$length/heldout" "data.seq_len=$length" \
        "model.vocab_size=$vocabulary" "run.tokens=$tokens" "${schedule[@]}" "$@"
}

pair() { # one objective through its phases: two data-parallel ranks, two tensor-parallel ones, two pipeline stages
    local objective=$1
    stage "$objective pretrain, data-parallel" train "$objective" pretrain 128 1300
    stage "$objective extend to longer rows, tensor-parallel" train "$objective" extend 512 200 parallel.tp=2 \
        batch.global_batch_rows=4 batch.micro_batch_rows=4 --init-from "$out/$objective/pretrain"
    stage "$objective decay, pipeline-parallel" train "$objective" decay 512 200 parallel.pp=2 \
        batch.global_batch_rows=4 batch.micro_batch_rows=1 --init-from "$out/$objective/extend"
}

is_newer() { # PATH OBJECTIVE: whether PATH was made from the objective's last checkpoint
    [[ -e $1 && $1 -nt $out/$2/decay/checkpoints/latest ]]
}

evaluate() {
    local objective
    for objective in mlm clm; do
        local answer=$out/$objective/eval.json
        is_newer "$answer" "$objective" ||
            { ettin eval "$out/$objective/decay" --data "$out/corpus-512/heldout" --baseline "$out/corpus-512" --json \
                >"$answer.part" && mv "$answer.part" "$answer"; } || return
    done
    python "$root/examples/show_losses.py" "$out/mlm/eval.json" "$out/clm/eval.json"
}

convert() {
    local objective
    for objective in mlm clm; do
        local folder=$out/$objective/hf
        is_newer "$folder" "$objective" && continue
        rm -rf "$folder"
        ettin convert to-hf "$out/$objective/decay" "$folder" --verify
    done
}

compare() {
    ettin compare "$out"/mlm/{pretrain,extend,decay} "$out"/clm/{pretrain,extend,decay} \
        --out "$out/compared.html" --require-paired
}

report() {
    ettin report "$out/mlm" "$out/clm" --out "$out/pair.html" --png "$out/figures"
}

stage "machine" python "$root/examples/check_machine.py" "$out"
stage "text" collect "$@"
stage "tokenizer" tokenizer
stage "prepare, chunks of 128 tokens" prepare 128
stage "prepare, chunks of 512 tokens" prepare 512
vocabulary=$(entries)
pair mlm
pair clm
stage "evaluate on the held-out documents" evaluate
stage "convert to Hugging Face folders" convert
stage "load with transformers" python "$root/examples/try_models.py" "$out/mlm/hf" "$out/clm/hf"
stage "compare" compare
stage "report" report

cat <<END
== done in $((SECONDS - began)) s
datasets            $out/corpus-128  $out/corpus-512
encoder's runs      $out/mlm/{pretrain,extend,decay}   (metrics.jsonl, checkpoints/, events/ for TensorBoard)
decoder's runs      $out/clm/{pretrain,extend,decay}
held-out losses     $out/mlm/eval.json  $out/clm/eval.json
for transformers    $out/mlm/hf  $out/clm/hf
proof               $out/compared.html  $out/compared.png
report of the pair  $out/pair.html   (open it in a browser; figures of it in $out/figures)
END
