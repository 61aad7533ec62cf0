#!/usr/bin/env bash
# Install into a virtual environment (.venv, or $VENV) and convert the model that comes with the package.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${VENV:-.venv}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --constraint constraints.txt --editable .
"$venv/bin/gqa" demo "$@"
