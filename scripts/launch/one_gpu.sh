#!/usr/bin/env bash
# Uptrain on one device: scripts/launch/one_gpu.sh CONFIG [--set a.b=c ...]
# Run it again to go on where it was stopped. SIGTERM and SIGUSR1 save and exit with code 75.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
exec "${PYTHON:-python}" -m gqa_convert.uptrain "$@" --set expect.engine=single --set expect.processes=1
