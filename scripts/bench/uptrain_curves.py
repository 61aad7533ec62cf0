#!/usr/bin/env python3
"""Held-out loss of a converted model against the share of its pretraining spent on uptraining it.

For every alpha a run of its own (its own cosine), from each start, with cross-entropy, with distillation from the
original, and with both; and the original itself, continued on the same tokens, as the control.

    python scripts/bench/uptrain_curves.py MODEL TRAIN.jsonl VAL.jsonl --groups 2 --out results.json
    python scripts/bench/uptrain_curves.py MODEL TRAIN.jsonl VAL.jsonl --groups 2 --out results.json \
        --no-control --starts fast best --objectives cross-entropy       # adds curves to the same file

The size of the pretraining is taken to be one pass over TRAIN (--epochs to assume more).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ALPHAS = (0.01, 0.02, 0.05, 0.1)
OBJECTIVES = ("cross-entropy", "distillation", "both")


def run(
    model: Path, output: Path, options: argparse.Namespace, tokens: int, distillation: dict[str, Any] | None
) -> Any:
    from gqa_convert.uptrain.loop import uptrain
    from gqa_convert.uptrain.read_config import parse_config

    settings = {
        "model": str(model),
        "output": str(output),
        "budget": {"tokens": tokens},
        "data": {
            "source": {"kind": "jsonl", "paths": [str(options.train)]},
            "held_out_source": {"kind": "jsonl", "paths": [str(options.val)]},
            "held_out_fraction": 0.0,
            "context": options.context,
            "separate_documents": False,
            "cache": str(output.parent / "tokens"),
        },
        "objective": {"distillation": distillation},
        "schedule": {"kind": "cosine", "peak": options.peak, "warmup_fraction": 0.1},
        "train": {
            "batch_sequences": options.batch,
            "micro_batch": options.batch,
            "precision": "float32",
            "device": "cpu",
        },
        "checkpoints": {"every_minutes": None},
        "evaluation": {"tokens": options.held_out_tokens},
        "log": {"trackers": [], "every_steps": 10},
    }
    return uptrain(parse_config(settings), quiet=True)


def pretraining_tokens(options: argparse.Namespace) -> int:
    from transformers import AutoTokenizer

    from gqa_convert.data.documents import SourceSpec, open_corpus
    from gqa_convert.data.encoding import Encoder

    encoder = Encoder(AutoTokenizer.from_pretrained(options.model))
    corpus = open_corpus(SourceSpec(kind="jsonl", paths=(str(options.train),)))
    return int(options.epochs) * sum(len(ids) for ids in encoder.stream(corpus.all_documents()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path)
    parser.add_argument("val", type=Path)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--starts", nargs="+", default=["mean"], help="merge methods or presets; calibrated on TRAIN")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--no-control", action="store_true", help="leave the original's own curve out")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--peak", type=float, default=1e-3)
    parser.add_argument("--held-out-tokens", type=int, default=32_000)
    parser.add_argument("--alphas", type=float, nargs="+", default=list(ALPHAS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    total = pretraining_tokens(options)
    teacher = {"teacher": str(options.model), "dtype": "float32"}
    objectives = {
        "cross-entropy": None,
        "distillation": teacher,
        "both": {**teacher, "cross_entropy_weight": 1.0},
    }
    results: dict[str, Any] = {
        "what": "held-out cross-entropy, nats per token, by alpha",
        "model": options.model.name,
        "groups": options.groups,
        "pretraining_tokens_assumed": total,
        "assumption": f"{options.epochs} pass(es) over the training text; the model's author states no number",
        "settings": {k: v for k, v in vars(options).items() if isinstance(v, (int, float, list)) and k != "groups"},
        "versions": {n: version(n) for n in ("gqa-convert", "torch", "transformers", "accelerate")}
        | {"python": platform.python_version()},
        "curves": {},
    }

    if options.out.is_file():
        results["curves"] = json.loads(options.out.read_text(encoding="utf-8"))["curves"]

    def curve(name: str, model: Path, work: Path, distillation: dict[str, Any] | None) -> None:
        points: dict[str, float] = {}
        seconds = 0.0
        for alpha in options.alphas:
            result = run(model, work / f"{name}-{alpha}".replace(" ", "-"), options, round(alpha * total), distillation)
            points["0"] = result.loss_before
            points[str(alpha)] = result.loss_after
            seconds += result.seconds
            print(f"{name}: alpha {alpha}: {result.loss_before:.4f} -> {result.loss_after:.4f}", flush=True)
        results["curves"][name] = {"loss": points, "seconds": round(seconds, 1)}
        options.out.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if not options.no_control:
            curve("control: the original, continued", options.model, work, None)
        for start in options.starts:
            converted = converted_by(start, options, work / f"start-{start}")
            for objective in options.objectives:
                curve(f"{start}, {objective}", converted, work, objectives[objective])


def converted_by(start: str, options: argparse.Namespace, out: Path) -> Path:
    """Convert the model by a merge method or a preset."""
    from gqa_convert.conversion.execute import convert
    from gqa_convert.conversion.recipe import PRESETS, make_recipe
    from gqa_convert.merge.registry import all_methods

    named = {"preset": start} if start in PRESETS else {"method": start}
    calibrate = str(options.train) if start in PRESETS or all_methods()[start].needs_statistics else None
    return convert(options.model, groups=options.groups, out=out, recipe=make_recipe(calibrate=calibrate, **named)).out


if __name__ == "__main__":
    main()
