#!/usr/bin/env python3
"""Measure how the time and memory of `fast` and `best` grow with layers, width and calibration tokens; project to 7B.

    python scripts/bench/solve_cost.py --out scripts/bench/results/solve_cost.json
    python scripts/bench/solve_cost.py --checkpoint MODEL --groups 2 --calibrate TEXT --out FILE

Random Llamas are written, and solved in child processes on one processor, on random tokens: what a solve costs does not
depend on what the numbers are. Time is processor time (wall time beside it: the machine may be shared), memory the
largest resident set less that of the process before it solves. `conversion/forecast.py` counts the same work; what it
leaves unexplained is the price of small matrices. `--project` prints the projection alone. The second command adds
conversions of a real checkpoint to the same file: whole commands, from start to end.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import measure

from gqa_convert.conversion.forecast import Work, held_bytes, operations, searched_sets

_CONVERT = "from gqa_convert.cli.main import convert_main; convert_main()"
STEPS, STEP_TOKENS = 300, 2048
H100_FLOPS, H100_SHARE = 67e12, 0.4
"""Peak of an NVIDIA H100 SXM in float32, without tensor cores (its data sheet), and the share that is assumed."""


@dataclass(frozen=True)
class Size:
    """One solve of a Llama whose MLP is 11/4 as wide as the model, to a quarter of its heads."""

    preset: str = "best"
    layers: int = 2
    width: int = 256
    tokens: int = 16_384
    head_dim: int = 64
    window: int = 512
    steps: int = 50

    @property
    def heads(self) -> int:
        """Query heads, and KV heads before."""
        return self.width // self.head_dim


POINTS = [
    *(Size(preset=preset) for preset in ("fast", "best")),
    *(Size(preset=preset, layers=8) for preset in ("fast", "best")),
    *(Size(preset=preset, width=1024) for preset in ("fast", "best")),
    *(Size(preset=preset, tokens=65_536) for preset in ("fast", "best")),
]
SEVEN_BILLION = Size(layers=32, width=4096, tokens=262_144, head_dim=128, window=2048, steps=STEPS)


def work_of(size: Size) -> Work:
    """The counts that a solve's cost follows from."""
    d, heads = size.width, size.heads
    groups = max(1, heads // 4)
    source = 4 * d * d  # weights of q, k, v and o
    return Work(
        tokens=size.tokens,
        layers=size.layers,
        width=d,
        whole=size.layers * (source + 3 * d * (11 * d // 4)),
        source=size.layers * source,
        target=size.layers * (2 * d * d + 2 * d * groups * size.head_dim),
        scores=size.layers * 4 * size.window * d,
        sets=searched_sets(heads) if groups > 1 else 0,
        group_width=heads / groups * size.head_dim,
        refit=size.preset == "best",
        fitted=size.steps * STEP_TOKENS,
    )


def arithmetic(size: Size) -> dict[str, float]:
    """Floating-point operations of a solve by part (two a multiply-add), and bytes of what it holds."""
    work = work_of(size)
    return operations(work) | {f"{name}, bytes": count for name, count in held_bytes(work).items()}


def total_flops(size: Size) -> float:
    """All of a solve's floating-point operations."""
    return sum(operations(work_of(size)).values())


def total_bytes(size: Size) -> float:
    """All that a solve holds."""
    return sum(held_bytes(work_of(size)).values())


def solve_one(size: Size) -> dict[str, float]:
    """Write a random Llama and solve it; runs in a child process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from gqa_convert.anatomy.anatomy import dissect
    from gqa_convert.anatomy.blocks import find_blocks
    from gqa_convert.anatomy.freedom import prove_freedom
    from gqa_convert.calibrate.solve import solve
    from gqa_convert.checkpoint.reader import Checkpoint
    from gqa_convert.conversion.recipe import make_recipe
    from gqa_convert.hf.loading import Source

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            hidden_size=size.width,
            intermediate_size=11 * size.width // 4,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            vocab_size=1024,
            max_position_embeddings=size.window,
        )
        LlamaForCausalLM(config).save_pretrained(Path(folder) / "source")
        anatomy = dissect(Source.open(Path(folder) / "source"), max(1, size.heads // 4))
        assert anatomy.difference is not None
        chosen = {"refit_steps": size.steps} if size.preset == "best" else {}
        recipe = make_recipe(size.preset, calibrate="random", **chosen)
        inputs = {"input_ids": torch.randint(0, 1024, (size.tokens // size.window, size.window))}
        blocks, freedom = find_blocks(anatomy.difference), prove_freedom(anatomy.config)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wall, cpu = time.perf_counter(), time.process_time()
        checkpoint = Checkpoint.open(Path(folder) / "source")
        solve(checkpoint, anatomy, blocks, freedom, recipe, inputs, work=Path(folder) / "work")
        return {
            "wall_s": round(time.perf_counter() - wall, 2),
            "processor_s": round(time.process_time() - cpu, 2),
            "memory_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e6, 1),
        }


def whole_commands(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run `gqa-convert` on a real checkpoint by mean, `fast` and `best`, each in a process of its own."""
    rows = []
    for preset in ("paper", "fast", "best"):
        with tempfile.TemporaryDirectory() as folder:
            chosen = ["--preset", preset, "--groups", str(args.groups), "--out", str(Path(folder) / "converted")]
            if preset != "paper" and args.calibrate:
                chosen += ["--calibrate", args.calibrate]
            if preset != "paper" and args.sequences:
                chosen += ["--calibration-sequences", str(args.sequences), "--calibration-length", str(args.length)]
            run = measure.run([sys.executable, "-c", _CONVERT, args.checkpoint, *chosen])
        row = {
            "model": args.name or Path(args.checkpoint).name,
            "groups": args.groups,
            "preset": preset,
            "wall_s": round(run.wall_s, 1),
            "processor_s": round(run.cpu_s, 1),
            "peak_mb": round(run.peak_mb),
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def project(rate: float) -> dict[str, Any]:
    """What `fast` and `best` of a 7B Llama take, at `rate` floating-point operations a second of one processor."""
    projected = {}
    for preset in ("fast", "best"):
        size = replace(SEVEN_BILLION, preset=preset)
        flops = total_flops(size)
        projected[preset] = {
            "parts": arithmetic(size),
            "flops": flops,
            "held_gb": total_bytes(size) / 1e9,
            "processor_hours": flops / rate / 3600,
            "h100_hours": flops / (H100_FLOPS * H100_SHARE) / 3600,
        }
    return projected


def show(rows: list[dict[str, Any]], projected: dict[str, Any], rate: float) -> None:
    """Print the tables as Markdown."""
    print("| preset | layers | width | tokens | processor s | wall s | GFLOP | GFLOP/s | MB |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for row in rows:
        size = Size(**row["size"])
        speed = row["gflop"] / row["processor_s"]
        print(
            f"| {size.preset} | {size.layers} | {size.width} | {size.tokens:,} | {row['processor_s']:.1f} "
            f"| {row['wall_s']:.1f} | {row['gflop']:.0f} | {speed:.1f} | {row['memory_mb']:.0f} |"
        )
    print(f"\n7B (32 layers, width 4096, 262,144 tokens), {rate / 1e9:.0f} GFLOP/s a processor:")
    for preset, cost in projected.items():
        print(
            f"{preset}: {cost['flops']:.2e} operations, {cost['held_gb']:.0f} GB, {cost['processor_hours']:.0f} "
            f"processor hours, {cost['h100_hours']:.2f} H100 hours"
        )
        for name, value in cost["parts"].items():
            print(f"    {name:32s} {value:.2e}")


def main() -> None:
    """Measure, project, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    parser.add_argument("--project", type=float, metavar="GFLOPS", help="only project, at so many GFLOP/s a processor")
    real = parser.add_argument_group("a real checkpoint, in the place of random ones")
    real.add_argument("--checkpoint", help="measure `gqa-convert` on it, from start to end")
    real.add_argument("--name", help="what to call it")
    real.add_argument("--groups", type=int, default=2)
    real.add_argument("--calibrate", help="text to calibrate on")
    real.add_argument("--sequences", type=int, help="calibration sequences")
    real.add_argument("--length", type=int, default=128, help="tokens of each")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(solve_one(Size(**json.loads(args.one)))))
        return
    if args.project:
        show([], project(args.project * 1e9), args.project * 1e9)
        return
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    known: dict[str, Any] = json.loads(args.out.read_text()) if args.out and args.out.is_file() else {}
    if args.checkpoint:
        added = whole_commands(args)
        kept = [row for row in known.get("commands", []) if row["model"] != added[0]["model"]]
        write(args.out, known | described() | {"commands": kept + added})
        return
    rows = []
    for size in POINTS:
        run = measure.run([sys.executable, __file__, "--one", json.dumps(asdict(size))])
        row = {"size": asdict(size), "gflop": total_flops(size) / 1e9, **json.loads(run.output.splitlines()[-1])}
        rows.append(row)
        print(f"{size}: {row['processor_s']} s, {row['memory_mb']} MB", flush=True)
    widest = next(row for row in rows if row["size"]["width"] == 1024 and row["size"]["preset"] == "best")
    rate = widest["gflop"] * 1e9 / widest["processor_s"]
    projected = project(rate)
    show(rows, projected, rate)
    figures = {
        "rows": rows,
        "rate_flops": rate,
        "h100": {"peak_flops": H100_FLOPS, "share": H100_SHARE},
        "seven_billion": projected,
    }
    write(args.out, known | described() | figures)


def described() -> dict[str, Any]:
    """What the figures were made with."""
    return {
        "machine": {"processor": platform.machine(), "python": platform.python_version(), "threads": 1},
        "versions": {name: version(name) for name in ("gqa-convert", "torch", "transformers")},
    }


def write(path: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures, if a file was named."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
