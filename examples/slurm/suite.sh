#!/bin/bash
# Six sizes x two objectives x three phases: an array of twelve runs for each phase, each run waiting for its own
# earlier phase.   DATA=data/corpus bash examples/slurm/suite.sh [options of `ettin launch`] [-- key=value ...]
# The scripts it writes and submits lie in runs/suite/slurm. SIZES=17m,32m does less.
set -euo pipefail
options=() words=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
[ $# -eq 0 ] || words=("${@:2}")

exec ettin launch --sweep "size=${SIZES:-17m,32m,68m,150m,400m,1b}" --sweep objective=mlm,clm \
    --nodes 4 --gpus-per-node 8 --cpus-per-task 12 --time 24:00:00 --at-once 4 --submit "${options[@]}" \
    -- train --phase all --run-dir "${RUN:-runs/suite}" data.mixture="${DATA:-data/corpus}" "${words[@]}"
