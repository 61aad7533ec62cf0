#!/usr/bin/env python
"""Set our figures beside published ones: one command per result, to be run where its model can be had.

    python scripts/anchors/run.py transmla-llama2 --data WIKITEXT2.txt --out runs/transmla
    python scripts/anchors/run.py mha2mla --data TEXT --uptrain-config RUN.yaml --uptrain-tokens 100M --out runs/mha2mla
    python scripts/anchors/run.py jin --data TEXT --out runs/jin
    python scripts/anchors/run.py jin --shrunk --out /tmp/jin    # the whole of it on the package's own small model

It converts by every variant, measures the original and all of them on the same text (and tasks of lm-eval), trains
where the published result has a control, and prints a table, what was published, and what was not run. Started again,
it goes on. No 7B model was run with it. Shrunk, tasks are the suite's continuations, and the figures say nothing about
the published ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from published import ANCHORS, Anchor
from rich.console import Console
from rich.table import Table

SHRUNK_TOKENS = 2048
SHRUNK_ITEMS = 12
SHRUNK_RUN = """\
model: replaced
output: replaced
data:
  source: {kind: python, paths: ["gqa_convert.data.stdlib:training_texts"]}
  held_out_source: {kind: python, paths: ["gqa_convert.data.stdlib:held_out_texts"]}
  context: 128
  special_tokens: false
  separate_documents: false
  cache: CACHE
schedule: {kind: constant, peak: 1.0e-4}
train: {batch_sequences: 4, micro_batch: 4, precision: float32, device: cpu}
evaluation: {tokens: 1024}
"""


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("anchor", choices=ANCHORS)
    parser.add_argument("--model", help="a folder or hub id [default: the published one]")
    parser.add_argument("--groups", type=int, help="KV heads [default: those that hold as much as the published cache]")
    parser.add_argument("--data", help="held-out text, for TransMLA's row the test part of WikiText-2")
    parser.add_argument(
        "--calibrate", default="self", help="text of presets that are calibrated [default: %(default)s]"
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens per window, side by side")
    parser.add_argument("--max-windows", type=int, default=0, help="0: all")
    parser.add_argument("--tasks-limit", type=int, help="examples of each task")
    parser.add_argument("--uptrain-config", type=Path, help="YAML of the training, where there is a control")
    parser.add_argument("--uptrain-tokens", default="0", help="tokens of it, for original and conversion alike")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--shrunk", action="store_true", help="on the package's own small model: minutes on a CPU")
    parser.add_argument("--out", type=Path, required=True, help="folder of conversions and results.json")
    return parser.parse_args()


def main() -> None:
    """Convert, measure, train, print."""
    args = parse_arguments()
    anchor = ANCHORS[args.anchor]
    from gqa_convert.budget.counts import parse_single
    from gqa_convert.checkpoint.embedded import DEMO

    tokens = 0 if args.uptrain_tokens == "0" else parse_single(args.uptrain_tokens, "--uptrain-tokens")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.shrunk:
        args.model, args.data, args.groups, args.calibrate, args.context = DEMO, DEMO, 2, "self", 128
        args.max_windows, args.device = 4, "cpu"
        if anchor.control:
            tokens = SHRUNK_TOKENS
            args.uptrain_config = args.out / "run.yaml"
            args.uptrain_config.write_text(SHRUNK_RUN.replace("CACHE", str(args.out / "tokens")))
    if args.data is None:
        sys.exit("--data is missing: name the text to measure on.")
    if tokens and args.uptrain_config is None:
        sys.exit("--uptrain-tokens: name the training's settings by --uptrain-config.")
    model, groups = args.model or anchor.model, args.groups or anchor.groups
    columns = conversions(anchor, model, groups, args)
    trained_tokens = tokens if anchor.control else 0
    if trained_tokens:
        columns |= trained(model, columns, trained_tokens, args)
    evaluation = measure(anchor, model, columns, args)
    lines = remarks(anchor, args, trained_tokens)
    results = {
        "anchor": args.anchor,
        "model": str(model),
        "groups": groups,
        "shrunk": args.shrunk,
        "uptrained_tokens": trained_tokens,
        "machine": f"{platform.machine()}, {evaluation.device}",
        "versions": {name: version(name) for name in ("gqa-convert", "torch", "transformers")},
        "evaluation": evaluation.to_json(),
        "published": list(anchor.rival),
        "remarks": lines,
    }
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    show(anchor, evaluation, lines)


def conversions(anchor: Anchor, model: str, groups: int, args: argparse.Namespace) -> dict[str, Path]:
    """Convert by every variant; what an earlier run has finished is kept."""
    import gqa_convert
    from gqa_convert.conversion.recipe import PRESETS

    folders = {}
    for variant in anchor.variants:
        folder = args.out / variant
        if not (folder / "gqa_convert.json").is_file():
            how: dict[str, Any] = {"preset": variant, "calibrate": args.calibrate}
            if variant not in PRESETS:
                how = {"method": variant} | ({} if variant == "mean" else {"calibrate": args.calibrate})
            gqa_convert.convert(model, groups=groups, out=folder, device=args.device, **how)
        folders[variant] = folder
    return folders


def trained(model: str, columns: dict[str, Path], tokens: int, args: argparse.Namespace) -> dict[str, Path]:
    """Train the original and the last conversion on the same tokens, with the same settings."""
    from gqa_convert.checkpoint.hub import resolve_model
    from gqa_convert.evaluate.sweep.uptrained import uptrain_point

    last = list(columns)[-1]
    both = {"original, trained": resolve_model(str(model)), f"{last}, trained": columns[last]}
    done = {}
    for name, folder in both.items():
        run = args.out / name.replace(", ", "-")
        run.mkdir(exist_ok=True)
        result = uptrain_point(folder, run / "uptrain", config=args.uptrain_config, tokens=tokens, key=f"{tokens}")
        place = args.out / f"{run.name}-model"
        if not place.exists():
            place.symlink_to(result.resolve(), target_is_directory=True)
        done[name] = place
    return done


def measure(anchor: Anchor, model: str, columns: dict[str, Path], args: argparse.Namespace) -> Any:
    """Score the original and all columns on the same text, and by the tasks."""
    from gqa_convert.evaluate.evaluation import EvalSettings, evaluate, with_tasks
    from gqa_convert.evaluate.suite.run import SuiteSettings, with_suite

    settings = EvalSettings(
        data=args.data, context=args.context, stride=args.context, max_windows=args.max_windows or None,
        dtype=args.dtype, device=args.device, batch_size=4,
    )  # fmt: skip
    folders = [str(folder) for folder in columns.values()]
    evaluation = evaluate(model, folders, settings)
    if anchor.tasks and args.shrunk:
        suite = SuiteSettings(kinds=("continuations",), count=SHRUNK_ITEMS)
        return with_suite(evaluation, [model, *folders], settings, suite)
    if anchor.tasks:
        return with_tasks(evaluation, [model, *folders], anchor.tasks, settings, limit=args.tasks_limit)
    return evaluation


def remarks(anchor: Anchor, args: argparse.Namespace, trained_tokens: int) -> list[str]:
    """What was not run, and what the figures are not."""
    lines = [f"not run: {left}" for left in anchor.left]
    if anchor.control and not trained_tokens:
        lines.append("not run: the control that is trained on as many tokens (--uptrain-config, --uptrain-tokens)")
    if args.shrunk:
        lines.append(f"not run: {anchor.model}; these are figures of the package's own small model")
        if anchor.tasks:
            lines.append(f"not run: {', '.join(anchor.tasks)}; in their place the suite's continuations")
    elif args.model and args.model != anchor.model:
        lines.append(f"not run: {anchor.model}; these are figures of {args.model}")
    return lines


def show(anchor: Anchor, evaluation: Any, lines: list[str]) -> None:
    """Print our figures, what was published, and what was not run."""
    out = Console(width=120)
    table = Table(box=None, pad_edge=False, title=anchor.paper, title_justify="left")
    for heading in ("ours", "KV heads", "cache per token", "perplexity", "loss rise [95 %]", "tasks, mean"):
        table.add_column(heading, justify="left" if heading == "ours" else "right")
    for number, row in enumerate((evaluation.base, *(pair.model for pair in evaluation.converted))):
        rise = "-"
        if number:
            pair = evaluation.converted[number - 1]
            low, high = pair.loss_difference_interval
            rise = f"{pair.loss_difference:+.4f} [{low:+.4f}, {high:+.4f}]"
        cache = f"{row.kv_cache_bytes_per_token:,} B"
        table.add_row(row.name, row.heads, cache, f"{row.perplexity:.3f}", rise, task_mean(evaluation, row))
    out.print(table)
    for published in anchor.rival:
        out.print(f"published: {published}", highlight=False)
    for line in lines:
        out.print(line, highlight=False)


def task_mean(evaluation: Any, row: Any) -> str:
    """The mean accuracy of a model's tasks, or its share of continuations."""
    if row.name in evaluation.tasks:
        values = [scores["acc"] for scores in evaluation.tasks[row.name].values() if "acc" in scores]
        return f"{100 * sum(values) / len(values):.1f}" if values else "-"
    figure = row.figures.get("suite_continuations")
    return "-" if figure is None else f"{100 * figure.value:.1f} (continuations)"


if __name__ == "__main__":
    main()
