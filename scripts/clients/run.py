#!/usr/bin/env python
"""Check that engines compute the same from a converted folder as transformers does, with the MHA model as control.

    scripts/clients/setup.sh clients-env
    python scripts/clients/run.py --environments clients-env            # scripts/clients/results.json, anew
    python scripts/clients/run.py --environments clients-env --engine vllm --model Llama
    python scripts/clients/engine_tables.py                              # the tables of docs, and what the plan says

Every model is random and tiny: 2 layers, 8 heads of 32. What an engine gets wrong of the control too is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from models import CASES, write_models, written_type
from rich.console import Console

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results.json"
ENGINES = {
    "transformers-4": ("previous", "transformers"),
    "transformers-5.0": ("first", "transformers"),
    "vllm": ("vllm", "vllm"),
    "llamacpp": ("llamacpp", "llamacpp"),
    "openvino": ("openvino", "openvino"),
    "ctranslate2": ("clients", "ctranslate2"),
    "genai": ("genai", "genai"),
    "onnx": ("clients", "onnx"),
    "mlx": ("clients", "mlx"),
    "lm_eval": ("clients", "lm_eval"),
}
"""Engine -> the environment it runs in, and its check."""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="folder that setup.sh filled")
    parser.add_argument("--engine", action="append", choices=ENGINES, help="only these [default: all]")
    parser.add_argument("--model", action="append", choices=CASES, help="only these models [default: all]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="other results there stay [default: %(default)s]")
    return parser.parse_args()


def ask(engine: str, environments: Path, folders: list[Path]) -> Iterator[dict[str, Any]]:
    """Run an engine's check on folders, in its environment: one answer per folder, in their order."""
    environment, check = ENGINES[engine]
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE), "TOKENIZERS_PARALLELISM": "false"}
    python = environments.absolute() / environment / "bin" / "python"
    command = [str(python), str(HERE / f"check_{check}.py"), *map(str, folders)]
    count = 0
    with tempfile.TemporaryDirectory() as modules, tempfile.TemporaryFile("w+") as said:
        variables |= {"HF_MODULES_CACHE": modules, "GGML_NO_BACKTRACE": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, env=variables) as running:
            assert running.stdout is not None
            for line in running.stdout:
                if line.startswith("ANSWER "):
                    count += 1
                    yield json.loads(line.removeprefix("ANSWER "))
        said.seek(0)
        last = f"exit code {running.returncode}: {' '.join(said.read().split())[-300:]}"
    for _ in folders[count:]:
        yield {"error": last, "version": engine}


def main() -> None:
    args = parse_arguments()
    err = Console(stderr=True)
    with tempfile.TemporaryDirectory() as root:
        subjects = []
        for name in args.model or CASES:
            for label, folder in write_models(Path(root), name):
                subjects.append(({"model": name, "label": label, "type": written_type(folder)}, folder))
        engines = {}
        if args.out.is_file():
            engines = json.loads(args.out.read_text(encoding="utf-8"))["engines"]
        for engine in args.engine or ENGINES:
            answers = ask(engine, args.environments, [folder for _, folder in subjects])
            known = engines.get(engine, {"answers": []})
            results = {(r["model"], r["label"]): r for r in known["answers"]}
            for (subject, folder), answer in zip(subjects, answers, strict=True):
                answer.pop("folder", None)
                release = answer.pop("version")
                if "error" in answer:  # no path of this machine in what is kept
                    answer["error"] = plain(answer["error"], folder, args.environments)
                results[subject["model"], subject["label"]] = subject | answer
                err.print(release, results[subject["model"], subject["label"]], highlight=False)
            names = list(CASES)
            ordered = sorted(results.values(), key=lambda r: names.index(r["model"]) if r["model"] in names else 999)
            engines[engine] = {"version": release, "answers": ordered}
            write(args.out, engines)


def write(out: Path, engines: dict[str, Any]) -> None:
    """Keep all results, in the order of the engines."""
    whole = {
        "reference": {name: version(name) for name in ("gqa-convert", "torch", "transformers")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": date.today().isoformat(),
        "engines": {name: engines[name] for name in ENGINES if name in engines},
    }
    out.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def plain(error: str, folder: Path, environments: Path) -> str:
    """An error without this machine's paths."""
    for path, name in ((str(folder), "FOLDER"), (str(environments.absolute()), "ENV"), (sys.prefix, "PYTHON")):
        error = error.replace(path, name)
    return re.sub(r"\S*\btmp\w{8}\b\S*", "TEMPORARY", " ".join(error.split()))


if __name__ == "__main__":
    main()
