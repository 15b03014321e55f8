#!/bin/bash
# Trains on all hosts of a Cloud TPU slice, which find each other; started again, it goes on from its last checkpoint.
#
#     TPU=my-slice ZONE=us-central2-b experiments/tpu_pod.sh configs/lpba40.py /mnt/shared/runs/lpba40 \
#         --config.data.directory=/mnt/shared/LPBA40
#
# Run from the checkout, on any machine with gcloud. It is copied to every host and installed there; data and workdir lie
# on a file system that every host has mounted (Filestore or another NFS), since all read and each writes its own part
# of a checkpoint.
set -euo pipefail
if [ $# -lt 2 ] || [ -z "${TPU:-}" ] || [ -z "${ZONE:-}" ]; then
    echo "usage: TPU=NAME ZONE=ZONE $0 CONFIG.py WORKDIR [--config.key=value ...]" >&2
    exit 2
fi
on_all_hosts() { gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"; }

git archive --format=tar.gz --output=/tmp/dilformer_jax.tar.gz HEAD
gcloud compute tpus tpu-vm scp /tmp/dilformer_jax.tar.gz "$TPU:/tmp/" --zone="$ZONE" --worker=all
on_all_hosts "mkdir -p dilformer_jax && tar -xzf /tmp/dilformer_jax.tar.gz -C dilformer_jax &&
    python3 -m venv dilformer_jax/.venv && dilformer_jax/.venv/bin/pip install -q -e 'dilformer_jax[plot]' 'jax[tpu]'"
# Quoted once more, for the shell on the other side.
on_all_hosts "cd dilformer_jax && .venv/bin/python -m dilformer_jax.train --config $(printf '%q ' "$1") --workdir $(printf '%q ' "${@:2}")"
