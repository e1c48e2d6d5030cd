#!/bin/bash
# The phases of one run as jobs that wait for each other: pretrain, then extend, then decay.
#   DATA=data/corpus bash examples/slurm/chain.sh [key=value ...]
# SBATCH_ARGS goes to each sbatch (an account, a smaller allocation). Prints the jobs' numbers.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
base=${RUN:-runs/150m-mlm}
read -ra options <<<"${SBATCH_ARGS:-}"

before=() after=()
for phase in pretrain extend decay; do
    # the script's own --phase and --run-dir come first; of an option that is given twice the last one counts
    job=$(RUN=$base/$phase sbatch --parsable --job-name="150m-mlm-$phase" --kill-on-invalid-dep=yes "${after[@]}" \
        "${options[@]}" "$here/one_node.sbatch" --phase "$phase" "${before[@]}" "$@")
    echo "$phase: job $job"
    before=(--init-from "$base/$phase") after=("--dependency=afterok:$job")
done
