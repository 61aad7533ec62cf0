#!/usr/bin/env bash
# Uptrain on every GPU of this machine: [ENGINE=ddp|fsdp2|deepspeed] [PROCESSES=8] scripts/launch/many_gpus.sh CONFIG [--set a.b=c ...]
# Run it again to go on where it was stopped. SIGTERM and SIGUSR1 are passed on: every process saves, the exit code is 75.
# (`accelerate launch --config_file configs/accelerate/...` trains alike, but its launcher answers a signal by itself.)
set -uo pipefail
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
. "$(dirname "${BASH_SOURCE[0]}")/engine.sh"
count=${PROCESSES:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
[ "$count" -ge 1 ] || { echo "no GPU found; say how many PROCESSES" >&2; exit 2; }

export MASTER_ADDR=127.0.0.1 MASTER_PORT=${MASTER_PORT:-$((20000 + $$ % 20000))}
export WORLD_SIZE=$count LOCAL_WORLD_SIZE=$count
# accelerate joins processes on CPU only if it is told that they are its launcher's.
export ACCELERATE_USE_CPU=${ACCELERATE_USE_CPU:-$(command -v nvidia-smi >/dev/null && echo false || echo true)}
pids=()
for ((rank = 0; rank < count; rank++)); do
  RANK=$rank LOCAL_RANK=$rank "${PYTHON:-python}" -m gqa_convert.uptrain "$@" \
    --set "expect.engine=$ENGINE" --set "expect.processes=$count" &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
trap 'kill -USR1 "${pids[@]}" 2>/dev/null' USR1

# One that fails would leave the others waiting for it: the first failure ends them all. A process whose end `wait` has
# told of once is not waited for again, and a trapped signal ends the pause and nothing else.
code=0 left=("${pids[@]}")
while [ "${#left[@]}" -gt 0 ]; do
  sleep 0.3 &
  wait $! 2>/dev/null
  still=()
  for pid in "${left[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      still+=("$pid")
      continue
    fi
    wait "$pid"
    status=$?
    if [ "$status" -ne 0 ] && [ "$code" -eq 0 ]; then
      code=$status
      if [ "$status" -ne 75 ]; then
        kill -TERM "${pids[@]}" 2>/dev/null
        # With the output of this script open it would keep whoever reads that waiting for a minute.
        (sleep 60; kill -KILL "${pids[@]}") >/dev/null 2>&1 &
      fi
    fi
  done
  left=(${still[@]+"${still[@]}"})
done
exit "$code"
