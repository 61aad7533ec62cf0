#!/usr/bin/env python
"""Everything `gqa eval` measures, of an original and its conversions, in parts of a few minutes each.

    python scripts/bench/suite_quality.py SMOLLM2 fast best --english EN.jsonl --python PY.jsonl --run runs/quality
    gqa report runs/quality
    python scripts/bench/suite_quality.py SMOLLM2 healed --english EN.jsonl --python PY.jsonl --run runs/healed

Each part is a `gqa eval` of its own, kept in RUN/parts and not done again; `--part` does one of them. When all are
there they are joined: RUN/english.json holds the loss with quantised caches, the suite and recall, RUN/python.json the
loss of code. A further conversion is a run of its own, whose items and windows are the same.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from gqa_convert.evaluate.files import write_json
from gqa_convert.evaluate.recall import with_figures as with_recall
from gqa_convert.evaluate.results import Evaluation
from gqa_convert.evaluate.suite.run import SuiteSettings
from gqa_convert.evaluate.suite.run import with_figures as with_suite

SEED = 0


def parts(args: argparse.Namespace) -> dict[str, list[str]]:
    """The options of each part."""
    loss = ["--context", str(args.context), "--stride", str(args.context), "--batch-size", "1"]
    windows = ["--max-windows", str(args.windows)]
    english, code = ["--data", args.english], ["--data", args.python]
    few = [*english, "--context", "128", "--max-windows", "1", "--suite-items", str(args.items)]
    return {
        "loss-english": [*english, *loss, *windows, "--quantised-cache", "int8,int4"],
        "loss-python": [*code, *loss, *windows],
        "likelihoods": [*few, "--suite-kinds", "continuations,agreement,arithmetic"],
        "generated": [*few, "--suite-kinds", "copying,json"],
        "code": [*few, "--suite-kinds", "code"],
        "recall": [*english, "--context", "128", "--max-windows", "1", "--recall", args.recall,
                   "--recall-items", str(args.recall_items)],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("converted", nargs="+")
    parser.add_argument("--english", required=True)
    parser.add_argument("--python", required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--part", help="do this one alone")
    parser.add_argument("--without", default="", help="parts that are left out: a list")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--items", type=int, default=20)
    parser.add_argument("--recall", default="256,512,1k")
    parser.add_argument("--recall-items", type=int, default=8)
    args = parser.parse_args()
    asked = {name: options for name, options in parts(args).items() if name not in args.without.split(",")}
    folder = args.run / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    for name in [args.part] if args.part else asked:
        out = folder / f"{name}.json"
        if not out.exists():
            started = time.perf_counter()
            command = [sys.executable, "-m", "gqa_convert.cli", "eval", args.base, *args.converted, *asked[name]]
            subprocess.run([*command, "--dtype", "float32", "--out", str(out)], check=True)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    if not all((folder / f"{name}.json").exists() for name in asked):
        return
    found = {name: Evaluation.from_json(json.loads((folder / f"{name}.json").read_text())) for name in asked}
    whole = found["loss-english"]
    suite = [result for each in found.values() for result in each.suite]
    whole = with_suite(whole, suite, SuiteSettings(seed=SEED))
    whole = with_recall(whole, [result for each in found.values() for result in each.recall])
    write_json(args.run / "english.json", whole.to_json())
    if "loss-python" in found:
        write_json(args.run / "python.json", found["loss-python"].to_json())


if __name__ == "__main__":
    main()
