#!/usr/bin/env python
"""Check that clients compute the same from a converted folder as transformers does, with the MHA model as control.

    scripts/clients/setup.sh clients-env
    python scripts/clients/run.py --environments clients-env --out scripts/clients/results.json

Every model is random and tiny. A difference that the MHA control shows too is the client's own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from models import VARIANTS, write_models
from rich.console import Console

HERE = Path(__file__).resolve().parent
CLIENTS = {
    "transformers": "previous",
    "ctranslate2": "clients",
    "onnx": "clients",
    "mlx": "clients",
    "lm_eval": "clients",
    "llamacpp": "clients",
}
"""Check -> the environment it runs in."""
LIMIT_S = 600


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="folder that setup.sh filled")
    parser.add_argument("--client", action="append", choices=CLIENTS, help="only these [default: all]")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="only these models [default: all]")
    parser.add_argument(
        "--out", type=Path, help="keep JSON here and a table beside it as .md; other results there stay"
    )
    return parser.parse_args()


def ask(client: str, python: Path, folder: Path) -> dict[str, Any]:
    """Run one check in its environment."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE), "TOKENIZERS_PARALLELISM": "false"}
    command = [str(python), str(HERE / f"check_{client}.py"), str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {LIMIT_S} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
    if not lines:
        return {"error": f"exit code {done.returncode}: {' '.join(done.stderr.split())[-300:]}"}
    answer: dict[str, Any] = json.loads(lines[-1].removeprefix("ANSWER "))
    return answer


def table(results: list[dict[str, Any]]) -> str:
    """The results as Markdown: a row a client and variant, a column a number of KV heads."""
    labels = list(dict.fromkeys(r["label"] for r in results))
    lines = ["| client | model | " + " | ".join(labels) + " |", "|---|---|" + "---|" * len(labels)]
    notes: dict[str, str] = {}
    for client, variant in dict.fromkeys((r["client"], r["variant"]) for r in results):
        row = {r["label"]: r for r in results if (r["client"], r["variant"]) == (client, variant)}
        version = (
            next(r["version"] for r in row.values() if "version" in r)
            if any("version" in r for r in row.values())
            else client
        )
        cells = []
        for label in labels:
            if "difference" in row[label]:
                cells.append(f"{row[label]['difference']:.1e}")
            else:
                cells.append(f"fails [{notes.setdefault(row[label]['error'], str(len(notes) + 1))}]")
        lines.append(f"| {version} | {variant} | " + " | ".join(cells) + " |")
    lines += [""] + [f"[{number}] {error}" for error, number in notes.items()]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    args = parse_arguments()
    err = Console(stderr=True)
    results = []
    with tempfile.TemporaryDirectory() as root:
        for variant in args.variant or VARIANTS:
            folders = write_models(Path(root), variant)
            for client in args.client or CLIENTS:
                python = args.environments.absolute() / CLIENTS[client] / "bin" / "python"
                for label, folder in folders:
                    answer = ask(client, python, folder)
                    if "error" in answer:  # no path of this machine in what is kept
                        answer["error"] = answer["error"].replace(str(root), "").replace(str(Path.cwd()), "")
                    results.append({"client": client, "variant": variant, "label": label} | answer)
                    err.print(results[-1], highlight=False)
    if args.out is not None and args.out.is_file():
        new = {(r["client"], r["variant"]) for r in results}
        kept = json.loads(args.out.read_text(encoding="utf-8"))
        results += [r for r in kept if (r["client"], r["variant"]) not in new]
    results.sort(key=lambda r: (list(CLIENTS).index(r["client"]), list(VARIANTS).index(r["variant"])))
    text = table(results)
    Console(width=200).print(text, highlight=False, markup=False)
    if args.out is not None:
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        args.out.with_suffix(".md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
