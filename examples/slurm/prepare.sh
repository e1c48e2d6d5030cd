#!/bin/bash
# Tokenize and index a corpus by a job array, a job for each 32 workers:
#   INPUT=raw OUT=data/corpus bash examples/slurm/prepare.sh [options of `ettin prepare`]
# Returns when the array is submitted. Run it again to see its progress; --wait waits until the dataset is complete.
set -euo pipefail
exec ettin prepare "${INPUT:-raw}" --out "${OUT:-data/corpus}" --executor slurm --workers 32 --slurm-time 240 "$@"
