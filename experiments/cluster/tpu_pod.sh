#!/usr/bin/env bash
# A run on every host of a TPU pod slice: jax.distributed finds the others by itself. Run it again to resume.
#
#   experiments/cluster/tpu_pod.sh NAME ZONE experiments/palm.py:size=8b --config.data.paths='/mnt/corpus/*.jsonl.zst'
#
# The hosts share the working directory (a mounted file system: checkpoints are written by all of them).
set -euo pipefail

name=${1:?give the name of the TPU}
zone=${2:?give its zone}
experiment=${3:?give an experiment, such as experiments/palm.py:size=8b}
shift 3
printf -v flags ' %q' "$@"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all \
  --command="cd jaxlm && exec python3 -u -m jaxlm.main --config=$(printf %q "$experiment")$flags"
