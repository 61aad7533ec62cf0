#!/usr/bin/env python3
"""Print what each merge costs a model on held-out text: the increase of the loss over the original, nats per token.

    python scripts/bench/merge_quality.py MODEL --data HELD_OUT --calibrate TEXT --groups 4,2,1
    python scripts/bench/merge_quality.py demo --data demo --calibrate demo --groups 4,2,1

Converts by every row of the table to every number of groups, evaluates each conversion against the original on the same
windows, and writes the figures with versions as JSON, row by row: started again with the same `--out`, it goes on where
it stopped, and `--again ROW;ROW` measures rows anew. With `--heal-tokens` conversions by `fast` and `best` are also
healed, on the calibration text. `demo` is the model that comes with the package, and its text:
the held-out modules of the standard library to measure on, the others to calibrate on.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gqa_convert.budget.counts import parse_count

# Row -> what is chosen about the merge; `calibrated` rows are left out where no text is given.
ROWS: dict[str, dict[str, Any]] = {
    "random": {"method": "random"},
    "first": {"method": "first"},
    "mean": {},
    "mean + search": {"grouping": "search"},
    "aligned": {"method": "aligned", "calibrated": True},
    "pca: no data": {"method": "pca"},
    "pca": {"method": "pca", "calibrated": True},
    "pca + search": {"method": "pca", "grouping": "search", "calibrated": True},
    "pca + o_proj refit": {"method": "pca", "refit": True, "refit_steps": 0, "calibrated": True},
    "pca + fold": {"method": "pca", "fold": True, "calibrated": True},
    "fast": {"preset": "fast", "calibrated": True},
    "fast: self": {"preset": "fast"},
    "fast + o_proj refit": {"preset": "fast", "refit": True, "refit_steps": 0, "calibrated": True},
    "best": {"preset": "best", "calibrated": True},
    "best: self": {"preset": "best"},
    "fast, healed": {"preset": "fast", "calibrated": True, "healed": True},
    "best, healed": {"preset": "best", "calibrated": True, "healed": True},
}


def main() -> None:
    """Run the table."""
    args = parse_arguments()
    from gqa_convert.evaluate.evaluation import EvalSettings, evaluate
    from gqa_convert.evaluate.models import subject

    settings = EvalSettings(
        data=args.data, context=args.context, stride=args.context, max_windows=args.max_windows, batch_size=32
    )
    base = str(subject(args.model).folder)
    if args.calibrate == "demo":
        args.calibrate = str(demo_text(Path(tempfile.mkdtemp())))
    kept = earlier(args)
    table: dict[str, dict[str, Any]] = kept.get("rows", {})
    for name in args.rows or ROWS:
        for groups in args.groups:
            if str(groups) in table.get(name, {}):
                continue
            with tempfile.TemporaryDirectory() as folder:
                point = convert_one(base, Path(folder) / "converted", name, groups, args)
                if point is None:
                    continue
                evaluation = evaluate(base, [Path(folder) / "converted"], settings)
            seen = evaluation.converted[0]
            known = (evaluation.windows, evaluation.tokens, round(evaluation.base.loss, 5))
            if kept and known != (kept["windows"], kept["tokens"], round(kept["base_loss"], 5)):
                raise SystemExit(f"{args.out}: was measured on other text ({known} now); name another file")
            point |= {
                "increase": seen.loss_difference,
                "interval": list(seen.loss_difference_interval),
                "kl": seen.kl,
                "top1": seen.top1_agreement,
            }
            table.setdefault(name, {})[str(groups)] = point
            print(f"{name:20s} {groups:3d} groups  {point['increase']:+.4f} nats  {point['seconds']:.0f} s", flush=True)
            kept = described(args, table, evaluation)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(kept, indent=1) + "\n")
    if not kept:
        raise SystemExit("no row could be run")
    show(table, args.groups, kept["base_loss"])


def earlier(args: argparse.Namespace) -> dict[str, Any]:
    """What an earlier run of the same table wrote, less the rows that are to be measured again."""
    if not args.out or not args.out.exists():
        return {}
    kept: dict[str, Any] = json.loads(args.out.read_text())
    for name in args.again:
        kept["rows"].pop(name, None)
    return kept


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", default="demo", help="held-out text to measure on")
    parser.add_argument("--calibrate", help="text for the calibrated rows, other than the held-out")
    parser.add_argument("--groups", type=lambda text: [int(part) for part in text.split(",")], required=True)
    parser.add_argument("--context", type=int, help="tokens per window")
    parser.add_argument("--max-windows", type=int)
    parser.add_argument("--sequences", type=int, default=128, help="calibration sequences")
    parser.add_argument("--rows", type=lambda text: text.split(";"), help=f"of {'; '.join(ROWS)}")
    parser.add_argument("--again", type=lambda text: text.split(";"), default=[], help="rows to measure again")
    parser.add_argument("--heal-tokens", type=parse_count, help="tokens to heal on; without it no row is healed")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    return parser.parse_args()


def demo_text(folder: Path) -> Path:
    """Write the standard-library modules that the embedded model was trained on; one a line, as JSON."""
    from gqa_convert.data.stdlib import collect, split

    path = folder / "stdlib-training-modules.jsonl"
    training, _ = split(collect())
    path.write_text("".join(json.dumps({"text": module.text()}) + "\n" for module in training))
    return path


def convert_one(base: str, out: Path, name: str, groups: int, args: argparse.Namespace) -> dict[str, Any] | None:
    """Convert by one row and heal where it says so; None where a row lacks what it needs."""
    from gqa_convert import convert
    from gqa_convert.conversion.recipe import make_recipe
    from gqa_convert.uptrain.heal import HealOptions, heal

    chosen = dict(ROWS[name])
    calibrated, healed = chosen.pop("calibrated", False), chosen.pop("healed", False)
    if (calibrated and not args.calibrate) or (healed and not args.heal_tokens):
        return None
    if calibrated:
        chosen["calibrate"] = args.calibrate
    recipe = make_recipe(chosen.pop("preset", None), sequences=args.sequences, **chosen)
    started, worked = time.perf_counter(), time.process_time()
    start = out.with_name("start") if healed else out
    convert(base, groups=groups, out=start, recipe=recipe)
    if healed:
        options = HealOptions(text=args.calibrate, tokens=args.heal_tokens, context=args.context)
        heal(start, base, out=out, options=options, quiet=True)
    return {
        "seconds": round(time.perf_counter() - started, 1),
        "processor_seconds": round(time.process_time() - worked, 1),
        "recipe": recipe.to_json(),
    }


def show(table: dict[str, dict[str, Any]], groups: list[int], base_loss: float) -> None:
    """Print the table."""
    print(f"\nincrease over the original's {base_loss:.4f} nats per token")
    print(f"{'':20s} " + " ".join(f"{g:>4d} groups" for g in groups))
    for name, row in table.items():
        cells = (f"{row[str(g)]['increase']:+11.4f}" if str(g) in row else " " * 11 for g in groups)
        print(f"{name:20s} " + " ".join(cells))


def described(args: argparse.Namespace, table: dict[str, dict[str, Any]], evaluation: Any) -> dict[str, Any]:
    """The figures with what they were made of; names of files only, no paths."""
    for row in table.values():
        for point in row.values():
            if point["recipe"].get("calibrate"):
                point["recipe"]["calibrate"] = Path(point["recipe"]["calibrate"]).name
    return {
        "model": Path(args.model).name,
        "data": Path(args.data).name,
        "calibrate": Path(args.calibrate).name if args.calibrate else None,
        "context": evaluation.context,
        "windows": evaluation.windows,
        "tokens": evaluation.tokens,
        "base_loss": evaluation.base.loss,
        "machine": {"processor": platform.machine(), "python": platform.python_version()},
        "versions": {name: version(name) for name in ("gqa-convert", "torch", "transformers")},
        "rows": table,
    }


if __name__ == "__main__":
    main()
