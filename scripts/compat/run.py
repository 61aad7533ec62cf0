#!/usr/bin/env python3
"""Try the package with older and newer libraries: a virtual environment for each pair of torch and transformers.

    python scripts/compat/run.py --work /tmp/compat --torch 2.6.0,2.8.0,2.13.0 --transformers 4.57.0,5.0.0,5.10.0,5.23.0
    python scripts/compat/run.py --work /tmp/compat --torch 2.13.0+cpu --transformers 5.10.0 --python python3.12
    python scripts/compat/run.py --work /tmp/compat --torch 2.6.0 --transformers 5.0.0 --least

With `--least` the rest of the dependencies are the oldest that `pyproject.toml` allows; otherwise what pip finds fit.

Each environment gets the two, the rest of the dependencies, and this package without asking it for its bounds. Then
`check.py` runs in it. What was installed and what came out goes to `results.json`, pair by pair; pairs that are there
already are left out unless `--again`. An environment is removed after its pair unless `--keep`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "results.json"
OTHERS = ("safetensors", "accelerate", "datasets", "typer", "rich", "pydantic", "Jinja2", "PyYAML", "psutil", "numpy")
RECORDED = (
    "torch",
    "transformers",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "accelerate",
    "datasets",
    "typer",
    "numpy",
)


def main() -> None:
    """Run every pair that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=lambda text: text.split(","), required=True)
    parser.add_argument("--transformers", type=lambda text: text.split(","), required=True)
    parser.add_argument("--python", default=sys.executable, help="the Python of the environments")
    parser.add_argument("--least", action="store_true", help="the oldest of the other dependencies")
    parser.add_argument("--work", type=Path, required=True, help="where environments are made")
    parser.add_argument("--pip", default="", help="more arguments of `pip install`, such as an index of CPU wheels")
    parser.add_argument("--keep", action="store_true", help="keep the environments")
    parser.add_argument("--again", action="store_true", help="try pairs again that have results")
    args = parser.parse_args()
    python = subprocess.run(
        [args.python, "-c", "import platform; print(platform.python_version())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    for torch, transformers in product(args.torch, args.transformers):
        name = f"python {python}, torch {torch}, transformers {transformers}{', least' if args.least else ''}"
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        if name in results and not args.again:
            continue
        results[name] = one(args, torch, transformers)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        print(name, {key: value for key, value in results[name].items() if key != "installed"}, flush=True)


def one(args: argparse.Namespace, torch: str, transformers: str) -> dict[str, Any]:
    """Make an environment, check the package in it, remove it."""
    folder: Path = args.work / f"torch-{torch}-transformers-{transformers}"
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([args.python, "-m", "venv", str(folder)], check=True)
    python = str(folder / "bin" / "python")
    pip = [python, "-m", "pip", "install", "-q", *args.pip.split()]
    try:
        others = least() if args.least else OTHERS
        for wanted in ([f"torch=={torch}", f"transformers=={transformers}", *others], ["--no-deps", str(ROOT)]):
            done = subprocess.run([*pip, *wanted], capture_output=True, text=True, check=False)
            if done.returncode:
                return {"install": " ".join(done.stderr.split())[-400:]}
        checked = subprocess.run(
            [python, str(HERE / "check.py"), *RECORDED], capture_output=True, text=True, check=False, cwd=args.work,
            env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        if checked.returncode:
            return {"check": " ".join(checked.stderr.split())[-400:]}
        described: dict[str, Any] = json.loads(checked.stdout.splitlines()[-1])
        return described
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


def least() -> list[str]:
    """The rest of the dependencies at the lower bounds of `pyproject.toml`."""
    stated = re.search(r"^dependencies = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE)
    assert stated is not None
    bounds = re.findall(r'"([\w.-]+)>=([\w.]+)"', stated[1])
    return [f"{name}=={bound}" for name, bound in bounds if name not in ("torch", "transformers")] + ["numpy"]


if __name__ == "__main__":
    main()
