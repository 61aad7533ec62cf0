#!/usr/bin/env python3
"""Compare texts to calibrate on: what a preset costs on each held-out text, and what it takes, by calibration text.

    python scripts/bench/calibration_text.py MODEL --groups 1 --data en.jsonl --data py.jsonl --out figures.json

Converts with every text of `--texts` and scores the result on the same windows of every `--data`. Figures go to `--out`
text by text; started again with the same file, it goes on where it stopped. The texts:

    self       the model writes pieces of 256 tokens, joined to windows
    windows    the model writes windows as long as the calibration's
    sources    source files of the standard library (`--calibrate demo`)
    docs       its docstrings and the language reference's topics
    both       sources and docs, shuffled together
    FILE       any other word: a file, a folder or a hub dataset
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import processor


def main() -> None:
    """Measure every text that is not measured yet, and print the table."""
    args = parse_arguments()
    table: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else described(args)
    for data in args.data:
        if Path(data).name not in table["original"]:
            table["original"][Path(data).name] = held_out_loss(args.model, data, args)
    for name in args.texts:
        if Path(name).name not in table["texts"]:
            table["texts"][Path(name).name] = measure(name, args, table["original"])
            args.out.write_text(json.dumps(table, indent=1) + "\n")
            print(name, table["texts"][Path(name).name], flush=True)
    show(table)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--groups", type=int, required=True)
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--data", action="append", required=True, help="held-out text; can be repeated")
    parser.add_argument(
        "--texts", type=lambda text: text.split(","), default=["self", "windows", "sources", "docs", "both"]
    )
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a calibration sequence")
    parser.add_argument("--context", type=int, default=1024, help="tokens per held-out window")
    parser.add_argument("--max-windows", type=int, default=12, help="held-out windows of each text")
    parser.add_argument("--out", type=Path, required=True, help="figures as JSON")
    return parser.parse_args()


def measure(name: str, args: argparse.Namespace, original: dict[str, float]) -> dict[str, Any]:
    """Convert with one text, and score the result."""
    from gqa_convert import convert
    from gqa_convert.conversion.recipe import make_recipe

    with tempfile.TemporaryDirectory() as folder:
        started, worked = time.perf_counter(), time.process_time()
        calibrate = text_of(name, args, Path(folder))
        recipe = make_recipe(args.preset, calibrate=calibrate, sequences=args.sequences, length=args.length)
        convert(args.model, groups=args.groups, out=Path(folder) / "converted", recipe=recipe)
        seconds, processor = time.perf_counter() - started, time.process_time() - worked
        losses = {Path(data).name: held_out_loss(Path(folder) / "converted", data, args) for data in args.data}
    return {
        "increase": {data: round(loss - original[data], 4) for data, loss in losses.items()},
        "seconds": round(seconds, 1),
        "processor_seconds": round(processor, 1),
        "peak_mb_so_far": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6),
    }


def text_of(name: str, args: argparse.Namespace, folder: Path) -> str:
    """What `--calibrate` is given for a text of this script."""
    from gqa_convert.data import stdlib

    if name == "windows":
        return written(folder / "windows.jsonl", windows(args))
    if name == "docs":
        return written(folder / "docs.jsonl", stdlib.documentation_texts())
    if name == "both":
        return written(folder / "both.jsonl", [*stdlib.training_texts(), *stdlib.documentation_texts()])
    return {"self": "self", "sources": "demo"}.get(name, name)


def written(path: Path, texts: Iterable[str]) -> str:
    """Write documents as JSON lines; returns the path."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def windows(args: argparse.Namespace) -> Iterable[str]:
    """Documents as long as a window that the model writes, as many as the calibration wants."""
    from gqa_convert.calibrate.self_text import self_tokens
    from gqa_convert.hf.loading import Source

    source = Source.open(Path(args.model))
    ids = self_tokens(source, sequences=args.sequences, length=args.length, piece=args.length)
    texts: list[str] = source.tokenizer().batch_decode(ids, skip_special_tokens=True)
    return texts


def held_out_loss(model: Any, data: str, args: argparse.Namespace) -> float:
    """Loss on a held-out text, nats per token."""
    from gqa_convert.evaluate.evaluation import EvalSettings, evaluate

    settings = EvalSettings(data=data, context=args.context, stride=args.context, max_windows=args.max_windows)
    return round(evaluate(model, [], settings).base.loss, 5)


def described(args: argparse.Namespace) -> dict[str, Any]:
    """What the figures were made of; names of files only, no paths."""
    return {
        "model": Path(args.model).name,
        "preset": args.preset,
        "groups": args.groups,
        "calibration_sequences": args.sequences,
        "calibration_length": args.length,
        "context": args.context,
        "windows": args.max_windows,
        "machine": {"processor": processor(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("gqa-convert", "torch", "transformers")},
        "original": {},
        "texts": {},
    }


def show(table: dict[str, Any]) -> None:
    """Print the table."""
    names = list(table["original"])
    print(f"{'text':24s} " + " ".join(f"{name:>20s}" for name in names) + "  processor seconds")
    print(f"{'(original, nats/token)':24s} " + " ".join(f"{table['original'][name]:20.4f}" for name in names))
    for text, row in table["texts"].items():
        cells = " ".join(f"{row['increase'][name]:+20.4f}" for name in names)
        print(f"{text:24s} {cells}  {row['processor_seconds']:.0f}")


if __name__ == "__main__":
    main()
