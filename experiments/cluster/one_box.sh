#!/usr/bin/env bash
# Several processes on one machine, as a cluster has them: for trying what several do, or a process a GPU.
#
#   experiments/cluster/one_box.sh 2 experiments/quickstart.py:smoke --workdir=runs/two
#
# Each process sees its own GPUs where CUDA_VISIBLE_DEVICES lists some: they are dealt out evenly.
set -euo pipefail

count=${1:?give a number of processes}
experiment=${2:?give an experiment, such as experiments/quickstart.py:smoke}
shift 2
port=${PORT:-$((20000 + RANDOM % 20000))}
IFS=, read -r -a gpus <<< "${CUDA_VISIBLE_DEVICES:-}"
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' TERM INT
for ((i = 0; i < count; i++)); do
  mine=("${gpus[@]:i * ${#gpus[@]} / count:${#gpus[@]} / count}")
  if [ "${#mine[@]}" -gt 0 ]; then
    export CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${mine[*]}")
  fi
  python -u -m jaxlm.main --config="$experiment" --coordinator="localhost:$port" --num_processes="$count" \
    --process_id="$i" "$@" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
  wait "$pid" || code=$?
done
exit "$code"
