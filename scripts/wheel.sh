#!/usr/bin/env bash
# Build the wheel, list what is in it, install it into a new environment and run `gqa demo` from another folder:
#   bash scripts/wheel.sh [WORK]
# The new environment gets what pip resolves, as a user's would; SYSTEM_SITE=1 lets it borrow what this Python has.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=${1:-$(mktemp -d)}
python=${PYTHON:-python3}
mkdir -p "$work/dist" "$work/elsewhere"

"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work/dist" "$root"
wheel=$(ls -t "$work"/dist/gqa_convert-*.whl | head -n 1)
echo "$(basename "$wheel"): $(stat -c %s "$wheel" 2>/dev/null || stat -f %z "$wheel") bytes"
"$python" - "$wheel" <<'PY'
import sys
import zipfile
from collections import Counter

sizes, files = Counter(), Counter()
names = []
for entry in zipfile.ZipFile(sys.argv[1]).infolist():
    names.append(entry.filename)
    kind = entry.filename.rpartition(".")[2]
    sizes[kind] += entry.compress_size
    files[kind] += 1
for kind, size in sizes.most_common():
    print(f"{size:>10,} bytes  {files[kind]:>4} .{kind}")
strange = [name for name in names if not name.startswith(("gqa_convert/", "gqa_convert-"))]
wanted = ["py.typed", "demo/checkpoint/model.safetensors", "report/templates/page.html", "report/templates/sort.js"]
missing = [name for name in wanted if f"gqa_convert/{name}" not in names]
if strange or missing:
    raise SystemExit(f"in the wheel and not of the package: {strange}; missing from it: {missing}")
PY

"$python" -m venv ${SYSTEM_SITE:+--system-site-packages} "$work/venv"
"$work/venv/bin/pip" install --quiet "$wheel"
cd "$work/elsewhere"
env -u PYTHONPATH "$work/venv/bin/python" -c 'import gqa_convert; print("installed in", gqa_convert.__file__)' | sed "s|$work/||"
env -u PYTHONPATH "$work/venv/bin/gqa" --version
env -u PYTHONPATH "$work/venv/bin/gqa" demo --help > /dev/null
if [ -z "${NO_DEMO:-}" ]; then env -u PYTHONPATH "$work/venv/bin/gqa" demo; fi
echo "the wheel works from another folder"
