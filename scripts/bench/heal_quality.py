#!/usr/bin/env python3
"""Print what conversions of a model cost on texts of several kinds, before and after healing.

    python scripts/bench/heal_quality.py ORIGINAL --models best=B healed=H --texts en=EN.jsonl py=PY.jsonl

Every text is cut into windows and every model scored on the same ones: increase of the loss over the original's, its
interval, KL from the original, and how often both choose the same token. Kinds that were in neither calibration nor
healing text show whether healing is more than learning the text. Started again with the same `--out`, it goes on after
the last text.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def named(text: str) -> tuple[str, str]:
    """Split `name=path`."""
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text}: write it as name=path")
    return name, path


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original")
    parser.add_argument("--models", type=named, nargs="+", required=True, help="name=folder of each conversion")
    parser.add_argument("--texts", type=named, nargs="+", required=True, help="name=text of each kind")
    parser.add_argument("--context", type=int, default=512, help="tokens per window")
    parser.add_argument("--windows", type=int, default=8, help="windows of each text, the first ones")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", default="auto", help="bfloat16, float32, or as stored; alike for all models")
    parser.add_argument("--note", default="", help="kept in the JSON: how the models came about")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    return parser.parse_args()


def main() -> None:
    """Measure every text, and print the table."""
    args = parse_arguments()
    from gqa_convert.evaluate.evaluation import EvalSettings, evaluate

    kept: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    rows: dict[str, Any] = kept.get("texts", {})
    models = dict(args.models)
    for name, path in args.texts:
        if set(models) <= set(rows.get(name, {}).get("models", {})):
            continue
        started = time.process_time()
        settings = EvalSettings(
            data=path,
            context=args.context,
            stride=args.context,
            max_windows=args.windows,
            batch_size=args.batch,
            dtype=args.dtype,
        )
        evaluation = evaluate(args.original, list(models.values()), settings)
        scores = {
            model: {
                "increase": seen.loss_difference,
                "interval": list(seen.loss_difference_interval),
                "kl": seen.kl,
                "top1": seen.top1_agreement,
            }
            for model, seen in zip(models, evaluation.converted, strict=True)
        }
        rows[name] = {
            "windows": evaluation.windows,
            "tokens": evaluation.tokens,
            "original_loss": evaluation.base.loss,
            "processor_seconds": round(time.process_time() - started, 1),
            "models": scores,
        }
        print(f"{name}: " + ", ".join(f"{model} {s['increase']:+.3f}" for model, s in scores.items()), flush=True)
        if args.out:
            write(args, rows)
    show(rows, list(models))


def write(args: argparse.Namespace, rows: dict[str, Any]) -> None:
    """Keep the figures with what they were measured on."""
    described = {
        "original": Path(args.original).name,
        "context": args.context,
        "dtype": args.dtype,
        "note": args.note,
        "texts": rows,
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("gqa-convert", "torch", "transformers")},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(described, indent=1) + "\n")


def show(rows: dict[str, Any], models: list[str]) -> None:
    """Print increase of the loss and KL as a table."""
    print("\n| text | original | " + " | ".join(models) + " |\n|---|--:|" + "--:|" * len(models))
    for name, row in rows.items():
        cells = (f"{row['models'][m]['increase']:+.3f} (KL {row['models'][m]['kl']:.3f})" for m in models)
        print(f"| {name} | {row['original_loss']:.3f} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
