#!/usr/bin/env bash
# Start N workers side by side on this machine and wait for them: workers/local.sh N [options of `rnnq worker`].
# Ctrl-C or SIGTERM reaches each of them: they checkpoint, give their runs back and leave.
set -uo pipefail
# each worker in a process group of its own: Ctrl-C on a terminal goes to a whole group, and with what the trap below
# sends a worker would get two signals, of which the second means: at once
set -m

if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: workers/local.sh N [options of rnnq worker]" >&2
    exit 2
fi
n=$1
shift

pids=()
for i in $(seq "$n"); do
    # one bar a terminal: the first worker has it, the others print a line for each run
    if [ "$i" = 1 ]; then rnnq worker "$@" & else rnnq worker --no-bar "$@" & fi
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM

code=0
for pid in "${pids[@]}"; do
    # a trapped signal ends `wait` early: the worker is still saving its state
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
    wait "$pid" || code=$?
done
exit "$code"
