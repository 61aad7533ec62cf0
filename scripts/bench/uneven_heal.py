#!/usr/bin/env python3
"""Show what plans of KV heads are worth after healing: convert by each, heal all alike, measure on held-out text.

    python scripts/bench/uneven_heal.py MODEL --plans even=3 chosen=2,6,3,3,1 --calibrate TRAIN --data TEXT --out FILE

A plan is one number for all layers, or one for each. The first plan is what the others are set against: paired 95 %
bootstrap intervals of the difference of loss and divergence (KL), in nats per token, before and after. Every seed is
the calibration's and the healing's. The figures are written as they come; what was made stays in `--work`, and started
again the run goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from heal_quality import named
from uneven_quality import difference, recipe_of

from gqa_convert import convert
from gqa_convert.budget.counts import parse_count
from gqa_convert.evaluate import models
from gqa_convert.evaluate.evaluation import EvalSettings, make_task
from gqa_convert.evaluate.scoring import score_beside
from gqa_convert.uptrain.heal import HealOptions, heal

STAGES = ("converted", "healed")


def main() -> None:
    """Make what is missing, measure it, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--plans", type=named, nargs="+", required=True, help="name=groups, or name=groups,groups,...")
    parser.add_argument("--preset", default="best")
    parser.add_argument("--calibrate", required=True)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--length", type=int, help="tokens of a calibration sequence; those of --context if not given")
    parser.add_argument("--refit-steps", type=int)
    parser.add_argument("--text", help="to heal on; the calibration text if not given")
    parser.add_argument("--tokens", type=parse_count, default=parse_count("200k"), help="to heal on")
    parser.add_argument("--data", required=True, help="held-out text to measure on")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("uneven-heal-work"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "settings": {
            name: Path(value).name if name in ("model", "data", "calibrate", "text") and value else str(value)
            for name, value in vars(args).items()
            if name not in ("plans", "out", "work")
        },
        "plans": dict(args.plans),
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"python": platform.python_version()},
        "machine": f"{platform.machine()}, {platform.system()}",
        "runs": [],
    }
    for seed in range(args.seeds):
        made = {name: make(args, name, plan, seed) for name, plan in args.plans}
        result["runs"].append({"seed": seed, **measure(args, made)})
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    show(result["runs"])


def make(args: argparse.Namespace, name: str, plan: str, seed: int) -> dict[str, Path]:
    """The converted and the healed folder of a plan."""
    counts = [int(each) for each in plan.split(",")]
    folders = {stage: args.work / f"{name}-{seed}-{stage}" for stage in STAGES}
    started = time.process_time()
    if not folders["converted"].is_dir():
        groups = counts if len(counts) > 1 else counts[0]
        convert(args.model, groups, recipe=recipe_of(args, seed), out=folders["converted"])
    if not folders["healed"].is_dir():
        options = HealOptions(text=args.text or args.calibrate, tokens=args.tokens, context=args.context, seed=seed)
        heal(
            folders["converted"],
            args.model,
            out=folders["healed"],
            options=options,
            work=args.work / f"{name}-{seed}-run",
            trust_remote_code=len(counts) > 1,  # what this very program wrote
            quiet=True,
        )
    print(f"{name}, seed {seed}: {time.process_time() - started:.0f} processor seconds", flush=True)
    return folders


def measure(args: argparse.Namespace, made: dict[str, dict[str, Path]]) -> dict[str, Any]:
    """Loss and divergence of every folder on the same windows, and what sets a plan apart from the first."""
    subject = models.subject(args.model)
    settings = EvalSettings(data=args.data, context=args.context, stride=args.context, max_windows=args.windows)
    examples = make_task(subject, subject.source.tokenizer(), settings).examples
    names = [(name, stage) for name in made for stage in STAGES]
    loaded = [models.load(models.subject(str(made[n][stage]), trust_remote_code=True)) for n, stage in names]
    scored = score_beside(models.load(subject), loaded, examples)
    sums = {name: after for name, (_, after, _) in zip(names, scored, strict=True)}
    before = scored[0][0]
    first = next(iter(made))
    found: dict[str, Any] = {"original_loss": before.mean("loss"), "tokens": sum(before.tokens), "plans": {}}
    for name in made:
        plan = found["plans"][name] = {}
        for stage in STAGES:
            here, beside = sums[name, stage], sums[first, stage]
            plan[stage] = {"kl": here.mean("kl"), "increase": difference(here, before, "loss")}
            if name != first:
                plan[stage] |= {f"{kind}_minus_{first}": difference(here, beside, kind) for kind in ("kl", "loss")}
    return found


def show(runs: list[dict[str, Any]]) -> None:
    """Print a row for each plan and seed."""
    print("\n| plan | seed | converted: loss (KL) | healed: loss (KL) |\n|---|--:|--:|--:|")
    for run in runs:
        for name, plan in run["plans"].items():
            cells = (f"{plan[stage]['increase']['value']:+.3f} ({plan[stage]['kl']:.3f})" for stage in STAGES)
            print(f"| {name} | {run['seed']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
