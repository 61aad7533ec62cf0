#!/usr/bin/env python3
"""Show what a step of Muon over attention costs, matrices whole and head by head, by the width of the model.

    python scripts/bench/muon_cost.py --out scripts/bench/results/muon_cost.json

Random gradients for q, k, v and o of a few layers with one KV head; processor seconds for each layer, the median of
some steps, whole and by heads in turn. One thread unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

HEAD = 64
WIDTHS = (576, 1024, 2048)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rows = []
    for width in args.widths:
        seconds: dict[bool, list[float]] = {True: [], False: []}
        makers = {heads: optimizer(width, args.layers, heads) for heads in seconds}
        for number in range(args.repeats + 1):
            for heads, made in makers.items():
                started = time.process_time()
                made.step()
                if number:  # the first makes the state
                    seconds[heads].append((time.process_time() - started) / args.layers)
        whole, parts = median(seconds[False]), median(seconds[True])
        rows.append({"width": width, "whole_s": round(whole, 4), "by_heads_s": round(parts, 4)})
        print(f"width {width}: {whole:.4f} s a layer whole, {parts:.4f} by heads of {HEAD}", flush=True)
    if args.out:
        described = {
            "what": "processor seconds of a step of Muon for the attention of one layer",
            "head_dim": HEAD,
            "kv_heads": 1,
            "threads": torch.get_num_threads(),
            "rows": rows,
            "machine": platform.machine(),
            "versions": {name: version(name) for name in ("gqa-convert", "torch")},
        }
        args.out.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def optimizer(width: int, layers: int, heads: bool) -> Any:
    """Muon over random weights that have gradients."""
    import torch

    from gqa_convert.uptrain.muon import MuonWithAdamW

    def weights(rows: int, columns: int) -> list[torch.nn.Parameter]:
        made = [torch.nn.Parameter(torch.randn(rows, columns)) for _ in range(layers)]
        for weight in made:
            weight.grad = torch.randn(rows, columns)
        return made

    writes = weights(width, width) + weights(HEAD, width) + weights(HEAD, width)
    groups = [
        {"params": writes, "heads": (0, HEAD) if heads else None},
        {"params": weights(width, width), "heads": (1, HEAD) if heads else None},
    ]
    return MuonWithAdamW(groups, betas=(0.9, 0.95), eps=1e-8)


if __name__ == "__main__":
    main()
