#!/usr/bin/env bash
# Workers on one GPU of a SLURM cluster, two minutes warned before the time is up (or the job is preempted):
#     sbatch workers/slurm.sh 4 [options of `rnnq worker`]        four processes on the GPU
#     sbatch --array=0-7 workers/slurm.sh 4                       the same on eight GPUs
#     sbatch --array=0-7 workers/slurm.sh 1 --slice               each of them takes its own eighth of the runs
#     sbatch --gpus=2 workers/slurm.sh 1 --nproc 2                one run at a time on two GPUs
# At the warning each worker saves its run's state, gives it back and leaves; the next job goes on from there. Workers
# on several hosts need a database that all of them reach by a server: SQLite is for one host.
#SBATCH --job-name=rnnq
#SBATCH --gpus=1
#SBATCH --cpus-per-task=4
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --open-mode=append
set -uo pipefail

if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: sbatch workers/slurm.sh N [options of rnnq worker]" >&2
    exit 2
fi

# B: warns this shell alone, and a shell minds a trap only once its child in the foreground has ended: so the workers
# are in the background, and `wait`, which a signal interrupts, is where the shell stands
rnnq worker --processes "$@" &
pid=$!
trap 'kill -USR1 "$pid" 2>/dev/null' USR1 USR2 INT TERM

while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done  # interrupted, it returns while they still save
wait "$pid"
