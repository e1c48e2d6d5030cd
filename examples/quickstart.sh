#!/usr/bin/env bash
# From text to a compared and exported pair, on a CPU: prepare, train an encoder and a decoder through three phases on
# two ranks, evaluate, convert, load with transformers, compare, report. Run it again to continue where it stopped.
#
#   bash examples/quickstart.sh                 docstrings of the installed Python packages as text
#   bash examples/quickstart.sh TEXT_PATH...    text files, folders or .jsonl of your own
#   FULL=1 bash examples/quickstart.sh          about twice as long, for lower losses
#
# Environment variables: OUT is the output folder (default: quickstart, or quickstart-full). PERCENT scales the token
# budgets below (default: 100). TOKENIZER is a folder to use instead of the small tokenizer trained here; `ettin` is the
# recipe's, whose 50,368 entries need far more text. SEED is another seed of weights, masks and order.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
percent=${PERCENT:-100}
case ${1:-} in -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" && exit ;; esac
for path in "$@"; do
    [[ -e $path || $path == *://* ]] || { echo "quickstart: $path: no such file or folder" >&2 && exit 2; }
done
if [[ ${FULL:-0} != 0 ]]; then # kilotokens of the phases, bytes of text, share held out, seconds on two idle cores
    out=${OUT:-quickstart-full} pretrain=1300 extend=200 decay=200 bytes=12000000 holdout=0.02 fixed=70 training=360
else
    out=${OUT:-quickstart} pretrain=650 extend=60 decay=60 bytes=5000000 holdout=0.04 fixed=50 training=150
fi
mkdir -p "$out"

STAGES=11
number=0 began=$SECONDS
stage() { # NAME COMMAND...: a heading, the command, its seconds
    local name=$1 since=$SECONDS
    shift
    number=$((number + 1))
    printf '\n== stage %d of %d: %s\n' "$number" "$STAGES" "$name"
    "$@"
    echo "== $((SECONDS - since)) s"
}

together() { # COMMAND A B: `COMMAND A` and `COMMAND B` at the same time; the second one's output comes after the first's
    local log=$out/.second.log first=0 second=0
    (trap - INT && "$1" "$3") >"$log" 2>&1 & # Ctrl-C ends it too, which bash otherwise keeps from background jobs
    "$1" "$2" || first=$?
    wait $! || second=$?
    cat "$log"
    return $((first ? first : second))
}

trap 'echo "quickstart: stopped; run the same command again to continue" >&2 && exit 130' INT

cat <<END
This trains an encoder and a decoder of 1.1M weights on the same text and proves that they are a pair.
It takes about $(((fixed + training * percent / 100 + 59) / 60)) minutes on two idle cores. The first run makes a Python environment before (1 to 2 minutes).
Everything goes to $out/. To stop, press Ctrl-C. To continue, run the same command again.

== environment
END
venv=$(bash "$root/tools/setup_venv.sh")
export PATH="$venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two ranks, one thread each
echo "== $((SECONDS - began)) s"
began=$SECONDS

collect() { # sets `text`
    if [[ $# -gt 0 ]]; then
        text=("$@")
        echo "$*"
        return
    fi
    text=("$out/docstrings.jsonl")
    [[ -f ${text[0]} ]] || python "$root/examples/docstrings.py" --out "${text[0]}" --max-bytes "$bytes"
}

tokenizer() { # sets `tokenizer`
    tokenizer=${TOKENIZER:-$out/tokenizer}
    [[ -n ${TOKENIZER:-} || -f $tokenizer/tokenizer_config.json ]] ||
        python "$root/examples/train_tokenizer.py" "${text[@]}" --vocab 4096 --out "$tokenizer"
}

prepare() { # LENGTH: the text in chunks of at most so many tokens, some of the documents held out
    ettin prepare "${text[@]}" --out "$out/corpus-$1" --holdout "$holdout" --chunk-tokens "$1" --seq-len "$1" \
        --tokenizer "$tokenizer" --workers 1
}

entries() { # of the vocabulary, as the dataset records it
    ettin inspect "$out/corpus-128" --json |
        python -c 'import json, sys; print(json.load(sys.stdin)["tokenizer"]["vocab_size"])'
}

train() { # OBJECTIVE: pretrain, extend and decay; resumes, or does nothing when done
    local budget=$((percent * 10)) # times kilotokens
    # The learning rate rises over a fifth of pretrain, then falls over each of the last two phases.
    torchrun --nproc-per-node 2 --no-python ettin train --size 17m --objective "$1" --phase all \
        --config "$root/examples/quickstart.yaml" --run-dir "$out/$1" "model.vocab_size=$vocabulary" \
        "pretrain.data.mixture=$out/corpus-128" "pretrain.data.validation=$out/corpus-128/heldout" \
        "extend.data.mixture=$out/corpus-512" "extend.data.validation=$out/corpus-512/heldout" \
        "decay.data.mixture=$out/corpus-512" "decay.data.validation=$out/corpus-512/heldout" \
        "pretrain.run.tokens=$((pretrain * budget))" "pretrain.schedule.warmup_tokens=$((pretrain * budget / 5))" \
        "extend.run.tokens=$((extend * budget))" "decay.run.tokens=$((decay * budget))" ${SEED:+"run.seed=$SEED"}
}

is_newer() { # PATH OBJECTIVE: whether PATH was made from the objective's last checkpoint
    [[ -e $1 && $1 -nt $out/$2/decay/checkpoints/latest ]]
}

evaluate() { # OBJECTIVE: its loss on the held-out documents
    local answer=$out/$1/eval.json
    is_newer "$answer" "$1" ||
        { ettin eval "$out/$1/decay" --data "$out/corpus-512/heldout" --baseline "$out/corpus-512" --json \
            >"$answer.part" && mv "$answer.part" "$answer"; }
}

convert() { # OBJECTIVE: to a folder for transformers, every tensor and the logits verified
    local folder=$out/$1/hf
    is_newer "$folder" "$1" && return
    rm -rf "$folder"
    ettin convert to-hf "$out/$1/decay" "$folder" --verify
}

compare() {
    ettin compare "$out"/mlm/{pretrain,extend,decay} "$out"/clm/{pretrain,extend,decay} \
        --out "$out/compared.html" --require-paired
}

report() {
    ettin report "$out/mlm" "$out/clm" --out "$out/pair.html" --png "$out/figures"
}

losses() {
    python "$root/examples/show_losses.py" "$out/mlm/eval.json" "$out/clm/eval.json"
}

evaluate_both() {
    together evaluate mlm clm && losses
}

stage "machine" python "$root/examples/check_machine.py" "$out"
stage "text" collect "$@"
stage "tokenizer" tokenizer
stage "datasets, in chunks of 128 and of 512 tokens" together prepare 128 512
vocabulary=$(entries)
stage "encoder: pretrain data-parallel, extend tensor-parallel, decay pipeline-parallel" train mlm
stage "decoder: the same" train clm
stage "evaluate both on the held-out documents" evaluate_both
stage "convert both to Hugging Face folders" together convert mlm clm
stage "load both with transformers" python "$root/examples/try_models.py" "$out/mlm/hf" "$out/clm/hf"
stage "compare: are they a pair?" compare
stage "report" report

cat <<END

== done in $(((SECONDS - began) / 60)) min $(((SECONDS - began) % 60)) s

$(losses)

PAIRED: both halves have one shape, one schedule, and read the same tokens in the same order. The proof is
$out/compared.html. Exports were read back and give the logits of transformers.

report of the pair  $out/pair.html   (open it in a browser; its figures are in $out/figures)
for transformers    $out/mlm/hf  $out/clm/hf
runs                $out/{mlm,clm}/{pretrain,extend,decay}   (metrics.jsonl, checkpoints/, events/ for TensorBoard)
datasets            $out/corpus-128  $out/corpus-512

Next: \`source $venv/bin/activate\` puts \`ettin\` on your PATH; docs/tutorial.md goes through the steps.
END
