#!/usr/bin/env python
"""Everything `gqa eval` measures, of an original and its conversions, in parts of a few minutes each.

    python scripts/bench/suite_quality.py SMOLLM2 fast best --english EN.jsonl --python PY.jsonl --run runs/quality
    python scripts/bench/suite_quality.py SMOLLM2 healed --english EN.jsonl --python PY.jsonl --run runs/quality
    gqa report runs/quality

Each part is a `gqa eval` of its own, kept in RUN/parts and not done again; `--part` does one of them. When all are
there they are joined: RUN/english.json holds the loss with quantised caches, the suite and recall, RUN/python.json the
loss of code. Conversions that are given later, with the same options, are measured beside the original on the same
windows and items, and join those that were measured before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from gqa_convert.evaluate.files import write_json
from gqa_convert.evaluate.recall import with_figures as with_recall
from gqa_convert.evaluate.results import Evaluation
from gqa_convert.evaluate.suite.run import SuiteSettings
from gqa_convert.evaluate.suite.run import with_figures as with_suite

SEED = 0
T = TypeVar("T")


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
    measured = "+".join(Path(folder).name for folder in args.converted)
    for name in [args.part] if args.part else asked:
        out = args.run / "parts" / measured / f"{name}.json"
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists():
            started = time.perf_counter()
            command = [sys.executable, "-m", "gqa_convert.cli", "eval", args.base, *args.converted, *asked[name]]
            subprocess.run([*command, "--dtype", "float32", "--out", str(out)], check=True)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    folders = [f for f in (args.run / "parts").iterdir() if all((f / f"{name}.json").exists() for name in asked)]
    folders.sort(key=lambda folder: (folder / "loss-english.json").stat().st_mtime)
    whole = [{name: read(folder / f"{name}.json") for name in asked} for folder in folders]
    if not whole:
        return
    english = joined([found["loss-english"] for found in whole])
    every = [each for found in whole for each in found.values()]
    suite = once((result for each in every for result in each.suite), lambda result: (result.model, result.kind))
    told = (result for each in every for result in each.recall)
    recall = once(told, lambda result: (result.model, result.kind, result.context))
    english = with_recall(with_suite(english, suite, SuiteSettings(seed=SEED)), recall)
    write_json(args.run / "english.json", english.to_json())
    if "loss-python" in asked:
        write_json(args.run / "python.json", joined([found["loss-python"] for found in whole]).to_json())


def read(path: Path) -> Evaluation:
    """What `gqa eval` wrote."""
    return Evaluation.from_json(json.loads(path.read_text()))


def joined(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Conversions of one original, measured on the same windows, as if they had been measured at once."""
    first = evaluations[0]
    for other in evaluations[1:]:
        if (other.base.name, other.base.loss, other.windows) != (first.base.name, first.base.loss, first.windows):
            raise SystemExit(
                f"{other.base.name}: other windows than before; the same --english, --context and --windows?"
            )
    rows = (row for each in evaluations for row in each.quantised)
    return replace(
        first,
        converted=tuple(row for each in evaluations for row in each.converted),
        quantised=tuple(once(rows, lambda row: (row.model.name, row.model.cache))),
    )


def once(results: Iterable[T], name: Callable[[T], Hashable]) -> list[T]:
    """The first of every name: the original comes with every further conversion."""
    found: dict[Hashable, T] = {}
    for result in results:
        found.setdefault(name(result), result)
    return list(found.values())


if __name__ == "__main__":
    main()
