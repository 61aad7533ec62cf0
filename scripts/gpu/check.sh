#!/usr/bin/env bash
# Everything that needs a GPU and was never run without one, in pieces of less than nine minutes:
#   scripts/gpu/check.sh [--out FOLDER] [--only PIECE ...] [--again] [--list] [--cpu]
# Interrupted, the same command goes on with the pieces that are missing or failed. FOLDER/check.json has every figure
# with the device named, FOLDER/check.md says what failed. --cpu tries the script itself out, with tiny models.
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/check.py" "$@"
