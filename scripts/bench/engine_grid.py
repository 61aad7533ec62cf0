#!/usr/bin/env python
"""Decode time in an engine of a random Llama with fewer and fewer KV heads, as a grid of batch x context.

    python scripts/bench/engine_grid.py --engine llama.cpp --engine-python clients-env/llamacpp/bin/python \
        --batch 1,8 --context 512,2k --out scripts/bench/results/engine-grid-llama-cpp.json
    python scripts/bench/engine_grid.py --table scripts/bench/results/engine-grid-llama-cpp.json

The shape is that of `decode.py` (16 layers, width 1,024, 16 heads of 64) with a small vocabulary, so that the engines
can be set beside the figures of transformers there. The models are written to a temporary folder and read by the
engines as any checkpoint is; they are timed as `gqa bench --engine` times them, in rounds that are interleaved.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from decode import llama
from rich.console import Console

from gqa_convert.budget.counts import parse_bytes, parse_counts
from gqa_convert.cli.show_bench import point_line, show_bench
from gqa_convert.evaluate.decode.settings import BenchSettings
from gqa_convert.evaluate.engines.bench import bench_engine
from gqa_convert.evaluate.engines.known import ENGINES
from gqa_convert.evaluate.files import write_json


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, nargs="+", help="print the table of these results, and time nothing")
    parser.add_argument("--engine", choices=ENGINES)
    parser.add_argument("--engine-python", help="Python of the environment that has the engine")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--groups", default="16,8,4,2,1", help="KV heads, the base first")
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--context", default="512,2k")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prefill-tokens", type=int, default=1, help="time reading up to so many tokens too")
    parser.add_argument("--cache-memory", help="also time as many requests as this much cache holds: 256MiB")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    args = parser.parse_args()
    if not args.table and args.engine is None:
        parser.error("--engine or --table is needed")
    return args


def write_model(folder: Path, args: argparse.Namespace, kv_heads: int) -> Path:
    """Write a Llama of random weights in float16 and return its folder."""
    model_class, config = llama(args, kv_heads)
    config.max_position_embeddings += 512  # engines ask for room behind the longest context
    torch.manual_seed(0)
    model_class._from_config(config, dtype=torch.float16).save_pretrained(folder)
    return folder


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a row per point, the base's time and the others' as shares of it, the floor's share in brackets."""
    points = [point for result in results for point in result["points"]]
    timed = next(point for point in points if not point.get("skipped"))
    heads = [model["kv_heads"] for model in timed["models"]]
    lines = [
        "| batch | context | " + " | ".join(map(str, heads)) + " | cache |",
        "|--:|--:|" + "--:|" * (len(heads) + 1),
    ]
    for point in sorted(points, key=lambda point: (point["context"], point["batch"])):
        cells = [str(point["batch"]), f"{point['context']:,}"]
        if point.get("skipped"):
            lines.append("| " + " | ".join([*cells, f"left out: {point['skipped']}", *[""] * len(heads)]) + " |")
            continue
        for model in point["models"]:
            if model["time_ratio"] is None:
                cells.append(f"{model['seconds']['median'] * 1e3:,.0f} ms")
            else:
                star = " *" if model["verdict"] == "no difference" else ""
                cells.append(f"{model['time_ratio']['median']:.2f} ({model['floor_ratio']:.2f}){star}")
        cells.append(f"{point['models'][0]['cache_bytes'] / 2**20:,.0f} MiB")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    args = parse_arguments()
    if args.table:
        print(table([json.loads(path.read_text()) for path in args.table]))
        return
    settings = BenchSettings(
        batches=parse_counts(args.batch, "--batch"),
        contexts=parse_counts(args.context, "--context"),
        steps=args.steps,
        rounds=args.rounds,
        prefill_tokens=args.prefill_tokens,
        cache_memory=parse_bytes(args.cache_memory, "--cache-memory") if args.cache_memory else None,
    )
    err = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="engine-grid-") as work:
        names = {groups: f"{groups} KV heads" for groups in parse_counts(args.groups, "--groups")}
        folders = [write_model(Path(work) / name, args, groups) for groups, name in names.items()]
        measured = bench_engine(
            folders,
            args.engine,
            settings,
            python=args.engine_python,
            dtype=args.dtype,
            on_point=lambda point: err.print(point_line(point), highlight=False),
        )
    show_bench(measured)
    if args.out is not None:
        shape = {name: getattr(args, name) for name in ("layers", "width", "heads", "vocab")}
        write_json(args.out, measured.to_json() | {"model": shape})
        print(table([measured.to_json()]))


if __name__ == "__main__":
    main()
