#!/bin/bash
# Trains on every GPU of several nodes under Slurm, one process a GPU; started again, it goes on from its last checkpoint.
#
#     sbatch --nodes=2 experiments/slurm.sh configs/lpba40.py runs/lpba40 --config.data.directory=/data/LPBA40
#
# The checkout with its .venv (`make demo` makes it; then .venv/bin/pip install 'jax[cuda13]'), the data and the workdir
# lie where all nodes see them. Adapt the number of GPUs a node to yours, in both lines.
#
#SBATCH --job-name=dilformer
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@60
#SBATCH --requeue
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: sbatch --nodes=N $0 CONFIG.py WORKDIR [--config.key=value ...]" >&2
    exit 2
fi
config=$1 workdir=$2
shift 2
# GPUs by node, not by task: each process sees all of its node, and JAX gives it the one of its rank. The processes find
# each other by Slurm's variables.
exec srun --kill-on-bad-exit=1 .venv/bin/python -m dilformer_jax.train --config "$config" --workdir "$workdir" "$@"
