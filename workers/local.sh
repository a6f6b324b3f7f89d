#!/usr/bin/env bash
# Start N workers on every visible GPU of this machine, or N on its CPU where there is none, and wait for them:
#     workers/local.sh N [options of `rnnq worker`]
# CUDA_VISIBLE_DEVICES says which GPUs are visible. Ctrl-C, SIGTERM or SIGUSR1 reaches each worker once: they
# checkpoint, give their runs back and leave.
set -uo pipefail
# each leader in a process group of its own: Ctrl-C on a terminal goes to a whole group, and with what the trap below
# sends they would get two signals, of which the second means: at once
set -m

if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: workers/local.sh N [options of rnnq worker]" >&2
    exit 2
fi
n=$1
shift

# CUDA counts what is visible from 0, whatever its number in the machine
gpus=0
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    gpus=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -cv -e '^$' -e '^-1$')
elif command -v nvidia-smi >/dev/null; then
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ')
fi

pids=()
start() {
    rnnq worker --processes "$n" "$@" &
    pids+=($!)
}
if [ "$gpus" -eq 0 ]; then
    start "$@"
else
    for gpu in $(seq 0 $((gpus - 1))); do start --gpu "$gpu" "$@"; done
fi
trap 'kill -TERM "${pids[@]}" 2>/dev/null' INT TERM
trap 'kill -USR1 "${pids[@]}" 2>/dev/null' USR1 USR2  # a warning, such as SLURM's, never means: at once

code=0
for pid in "${pids[@]}"; do
    # a trapped signal ends `wait` early: the workers are still saving their state
    # (-f: not when they are only stopped; older shells do not know it)
    while kill -0 "$pid" 2>/dev/null; do wait -f "$pid" 2>/dev/null || wait "$pid"; done
    wait "$pid" || code=$?
done
exit "$code"
