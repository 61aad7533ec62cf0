#!/usr/bin/env bash
# Build the documentation site into build/site, and fail on a dead link: bash scripts/docs.sh [serve]
# Needs `pip install '.[docs]'`. Files outside docs/ that pages lead to are linked in the repository, not copied.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
"$PYTHON" scripts/docs_links.py
"$PYTHON" scripts/docs_links.py --stage build/docs
"$PYTHON" -m mkdocs "${1:-build}" --strict
