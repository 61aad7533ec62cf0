#!/usr/bin/env bash
# Make the environments of the client checks: scripts/clients/setup.sh FOLDER
# `clients` holds CTranslate2, ONNX Runtime, mlx-lm, lm-eval and llama.cpp; `previous` the previous major of transformers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
folder=${1:?usage: setup.sh FOLDER}
for name in clients previous; do
  [ -x "$folder/$name/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder/$name"
  "$folder/$name/bin/python" -m pip install --quiet -r "requirements-$name.txt"
done
