#!/usr/bin/env bash
# Install with the development tools into a virtual environment (.venv, or $VENV) and run every check.
# Arguments go to pytest: scripts/test.sh tests/test_cli.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/mypy" # the package and its tests
for folder in anchors bench clients compat gpu reproduce; do # each folder's files import one another by name
  MYPYPATH="scripts/$folder" "$venv/bin/mypy" "scripts/$folder"
done
"$venv/bin/mypy" scripts/make_demo_checkpoint.py
"$venv/bin/python" -m pytest "$@"
