#!/usr/bin/env python3
"""How much of what merging heads cost a T5 comes back in a few minutes of uptraining by the paper's recipe.

    python scripts/bench/t5_recovery.py T5_FOLDER TRAIN.txt HELD_OUT.txt --groups 2 --out results.json

With --adapt N the model is first trained for N steps of span corruption: one that was fine-tuned for something else has
forgotten the task, and its loss on it says nothing until then. What comes out of that is "the original" of the rest.

The original is converted by each of --starts and uptrained by span corruption, once on the text itself (cross-entropy)
and once to predict what the original predicts (distillation). The original is trained on the same batches as the
control: what it gains is learning the text, not recovering from the merge. Held-out cross-entropy and, for
distillation, KL from the original, in nats a target token. Adafactor and T5's schedule continued from step 1M, no
dropout. The figures are written as they come.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ORIGINAL = "the original"
OBJECTIVES = ("cross-entropy", "distillation")


def main() -> None:
    """Run what is missing, and print the table."""
    options = parse_arguments()
    results = described(options)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if options.adapt:
            results["adaptation"] = one_run(options, options.model, work / "adapted", "cross-entropy", options.adapt)
            show("adaptation", results["adaptation"])
            options.model = work / "adapted" / "final"
        for start in (ORIGINAL, *options.starts):
            model = options.model if start == ORIGINAL else converted(options, start, work / start)
            for objective in OBJECTIVES[: 1 if start == ORIGINAL else None]:
                key = f"{start}, {objective}"
                results["runs"][key] = one_run(options, model, work / key, objective, options.steps)
                options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                show(key, results["runs"][key])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("train", type=Path, help="text or .jsonl")
    parser.add_argument("held_out", type=Path, help="text or .jsonl")
    parser.add_argument("--documents", default="paragraph", help="how text is cut: file, line, paragraph, a separator")
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--starts", nargs="+", default=["mean", "pca"], help="merge methods or presets")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--adapt", type=int, default=0, metavar="N", help="steps of span corruption before all else")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held-out-tokens", type=int, default=16_000, help="of the text, before corruption")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def one_run(options: argparse.Namespace, model: Path, output: Path, objective: str, steps: int) -> dict[str, Any]:
    """Train one model with one objective; returns its curve by step."""
    from gqa_convert.uptrain.loop import uptrain
    from gqa_convert.uptrain.metrics import read_metrics
    from gqa_convert.uptrain.read_config import parse_config

    result = uptrain(parse_config(settings(options, model, output, objective, steps)))
    evaluations = [r for r in read_metrics(output / "metrics.jsonl") if r["kind"] == "evaluation"]
    curve = {str(r["step"]): round(r["held_out_loss"], 4) for r in evaluations}
    kl = {str(r["step"]): round(r["held_out_kl"], 4) for r in evaluations if "held_out_kl" in r}
    scored = int(evaluations[0]["held_out_tokens"])
    return {"loss": curve, **({"kl": kl} if kl else {}), "scored_tokens": scored, "seconds": round(result.seconds, 1)}


def converted(options: argparse.Namespace, start: str, out: Path) -> Path:
    """Convert by a merge method or a preset, calibrated on the training text where it can be."""
    from gqa_convert.conversion.execute import convert
    from gqa_convert.conversion.recipe import PRESETS, make_recipe
    from gqa_convert.merge.registry import all_methods

    named = {"preset": start} if start in PRESETS else {"method": start}
    calibrated = start in PRESETS or start == "pca" or all_methods()[start].needs_statistics
    text = {"calibrate": str(options.train), "sequences": 64, "length": options.context} if calibrated else {}
    recipe = make_recipe(named.pop("preset", None), **named, **text)
    return convert(options.model, groups=options.groups, out=out, recipe=recipe).out


def settings(options: argparse.Namespace, model: Path, output: Path, objective: str, steps: int) -> dict[str, Any]:
    """The run's configuration: configs/t5-paper.yaml, small."""
    step = options.batch * options.context
    teacher = {"teacher": str(options.model), "dtype": "float32"} if objective == "distillation" else None
    return {
        "model": str(model),
        "output": str(output),
        "trust_remote_code": True,
        "budget": {"steps": steps},
        "data": {
            "source": source(options.train, options.documents),
            "held_out_source": source(options.held_out, options.documents),
            "held_out_fraction": 0.0,
            "context": options.context,
            "cache": str(output.parent / "tokens"),
        },
        "objective": {"kind": "span_corruption", "distillation": teacher},
        "optimizer": {"kind": "adafactor", "clip": None},
        "schedule": {"kind": "inverse_sqrt", "peak": 1.0, "start_step": "1M"},
        "train": {
            "batch_sequences": options.batch,
            "micro_batch": options.batch,
            "dropout": 0.0,
            "precision": "float32",
            "device": "cpu",
        },
        "checkpoints": {"every_minutes": None},
        "evaluation": {
            "tokens": options.held_out_tokens,
            "at_tokens": [steps // 4 * step, steps // 2 * step],
        },
        "log": {"trackers": [], "every_steps": 10},
    }


def source(path: Path, documents: str) -> dict[str, Any]:
    """A file as a data source."""
    if path.suffix == ".jsonl":
        return {"kind": "jsonl", "paths": [str(path)]}
    return {"kind": "text", "paths": [str(path)], "documents": documents}


def show(key: str, run: dict[str, Any]) -> None:
    """Print a run's line."""
    losses = "  ".join(f"{step}: {loss:.3f}" for step, loss in run["loss"].items())
    kl = "  ".join(f"{step}: {value:.3f}" for step, value in run.get("kl", {}).items())
    print(f"{key:28s} loss by step  {losses}" + (f"   KL  {kl}" if kl else "") + f"   {run['seconds']} s", flush=True)


def described(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures were made of; names only, no paths."""
    names = ("documents", "groups", "steps", "adapt", "context", "batch", "held_out_tokens")
    return {
        "what": "held-out span-corruption loss and KL from the original, nats a target token, by step",
        "model": options.model.name,
        "train": options.train.name,
        "held_out": options.held_out.name,
        "settings": {name: getattr(options, name) for name in names},
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("gqa-convert", "torch", "transformers", "accelerate")},
        "runs": {},
    }


if __name__ == "__main__":
    main()
