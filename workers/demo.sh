#!/usr/bin/env bash
# The main job as a user does it: a study of small nets on real text, its best tenth grown and trained on.
# `make demo` runs it in the repository root; run again, it finds everything done.
set -euo pipefail

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}

began=$SECONDS
run rnnq init defs/demo.py
run workers/local.sh 2 --stage demo
run rnnq status
run rnnq examine --stage demo --filter "loss<2.6" --limit 10
run rnnq promote --stage demo --top 10%
run workers/local.sh 2 --stage demo-2
run rnnq status
run rnnq examine --stage demo-2 --by val_loss

printf '\nDone in %d s. It lies in:\n' $((SECONDS - began))
printf '  %s\n' "experiments.db    every run, attempt and point: rnnq ls, rnnq show 1" \
    "checkpoints/      the last and the best state of each run" \
    "figures/          curves, hyper-parameters, memory, each with its numbers as CSV"
