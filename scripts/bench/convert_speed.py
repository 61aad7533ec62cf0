"""Time and memory of converting a checkpoint, beside `cp -r` of it and beside loading, pooling and saving it.

    python scripts/bench/convert_speed.py            # 2.7 GB and 0.7 GB, 5 rounds: about 8 minutes, 9 GB of disk

Every round runs each command once, in turn, so that other work on the machine falls on all of them alike. The page
cache is warm: the source has just been written or read, as it is after a download. `beyond start-up` is the converter's
time less that of the same command with --dry-run in the same round, which imports torch and transformers, reads every
header and plans, but writes nothing. The converter waits for the disk, `cp` and transformers do not: so `cp -r`
is timed with a flush too, and the converter with --no-flush. Processor time is given beside wall time: it is what a
busy machine bends least.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from measure import Measured, run

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "convert_speed.json"
GROUPS = "8"
MODELS = {
    "2.7 GB": {"layers": 24, "hidden": 2048, "heads": 32, "shards": 4},
    "0.7 GB": {"layers": 22, "hidden": 1024, "heads": 16, "shards": 1},
}


def commands(source: Path, target: Path) -> dict[str, list[str]]:
    """The commands to compare, by name."""
    convert = [
        str(Path(sys.executable).with_name("gqa-convert")),
        str(source),
        "--groups",
        GROUPS,
        "--out",
        str(target),
    ]
    return {
        "cp -r": ["cp", "-r", str(source), str(target)],
        "cp -r, flushed": ["sh", "-c", f"cp -r {source} {target} && sync {target}/* {target}"],
        "gqa-convert --dry-run": [*convert, "--dry-run"],
        "gqa-convert": convert,
        "gqa-convert --no-flush": [*convert, "--no-flush"],
        "load-pool-save": [sys.executable, str(HERE / "load_pool_save.py"), str(source), str(target), GROUPS],
    }


def measure_model(name: str, sizes: dict[str, int], work: Path, rounds: int) -> dict[str, Any]:
    """Make one model and measure every command on it `rounds` times."""
    source, target = work / "source", work / "target"
    flags = [part for key, value in sizes.items() for part in (f"--{key}", str(value))]
    run([sys.executable, str(HERE / "big_llama.py"), str(source), *flags])
    taken: dict[str, list[Measured]] = {command: [] for command in commands(source, target)}
    for number in range(rounds):
        for command, arguments in commands(source, target).items():
            taken[command].append(run(arguments))
            shutil.rmtree(target, ignore_errors=True)
            print(f"{name} round {number + 1}: {command} {taken[command][-1].wall_s:.2f} s", file=sys.stderr)
    result = {"bytes": sum(file.stat().st_size for file in source.iterdir()), **summary(taken)}
    shutil.rmtree(source)
    return result


def summary(taken: dict[str, list[Measured]]) -> dict[str, Any]:
    """Medians over the rounds, and the ratios that the targets are about."""
    wall = {name: median(m.wall_s for m in runs) for name, runs in taken.items()}
    cpu = {name: median(m.cpu_s for m in runs) for name, runs in taken.items()}
    peak = {name: max(m.peak_mb for m in runs) for name, runs in taken.items()}
    pairs = list(zip(taken["gqa-convert"], taken["gqa-convert --dry-run"], strict=True))
    beyond = median(full.wall_s - dry.wall_s for full, dry in pairs)
    quick = zip(taken["gqa-convert --no-flush"], taken["gqa-convert --dry-run"], strict=True)
    unflushed = median(full.wall_s - dry.wall_s for full, dry in quick)
    cpu_beyond = median(full.cpu_s - dry.cpu_s for full, dry in pairs)
    loaded = median(float(m.output.split()[-1]) for m in taken["load-pool-save"])
    return {
        "wall_s": wall,
        "cpu_s": cpu,
        "peak_mb": peak,
        "beyond_startup_s": {
            "gqa-convert": beyond,
            "gqa-convert --no-flush": unflushed,
            "load-pool-save": loaded,
        },
        "beyond_startup_over_flushed_cp": beyond / wall["cp -r, flushed"],
        "no_flush_beyond_startup_over_cp": unflushed / wall["cp -r"],
        "load_pool_save_over_no_flush_beyond_startup": loaded / unflushed,
        "beyond_startup_over_cp": beyond / wall["cp -r"],
        "cpu_beyond_startup_over_cp": cpu_beyond / cpu["cp -r"],
        "load_pool_save_over_gqa_convert": wall["load-pool-save"] / wall["gqa-convert"],
        "load_pool_save_over_gqa_convert_beyond_startup": loaded / beyond,
        "peak_share_of_load_pool_save": peak["gqa-convert"] / peak["load-pool-save"],
        "runs": {
            name: [{k: v for k, v in asdict(m).items() if k != "output"} for m in runs] for name, runs in taken.items()
        },
    }


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "processor": model.partition(":")[2].strip() or platform.processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "safetensors", "gqa-convert")},
        "page_cache": "warm",
        "load_average": os.getloadavg(),
    }


def table(models: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| model | command | wall, s | beyond start-up, s | over cp -r | processor, s | peak memory, MB |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, result in models.items():
        copied = result["wall_s"]["cp -r"]
        for command, wall in result["wall_s"].items():
            beyond = wall if command.startswith("cp") else result["beyond_startup_s"].get(command)
            cells = [f"{beyond:.2f}", f"{beyond / copied:.2f}"] if beyond is not None else ["", ""]
            cells += [f"{result['cpu_s'][command]:.2f}", f"{result['peak_mb'][command]:.0f}"]
            lines.append(f"| {name} | {command} | {wall:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=MODELS, help="measure one size and write no results")
    parser.add_argument("--work", type=Path, help="folder for the models (default: the system's temporary one)")
    args = parser.parse_args()
    models = {}
    for name, sizes in MODELS.items():
        if args.only in (None, name):
            with tempfile.TemporaryDirectory(dir=args.work) as work:
                models[name] = measure_model(name, sizes, Path(work), args.rounds)
    print(table(models))
    for name, result in models.items():
        print(
            f"{name}: {result['beyond_startup_over_cp']:.2f} x cp -r beyond start-up "
            f"({result['beyond_startup_over_flushed_cp']:.2f} x a flushed cp -r; without flush "
            f"{result['no_flush_beyond_startup_over_cp']:.2f} x cp -r); "
            f"{result['load_pool_save_over_gqa_convert']:.1f} x faster than load-pool-save "
            f"({result['load_pool_save_over_gqa_convert_beyond_startup']:.1f} x beyond start-up, without flush "
            f"{result['load_pool_save_over_no_flush_beyond_startup']:.1f} x), "
            f"with {result['peak_share_of_load_pool_save']:.2f} of its memory"
        )
    if args.only is None:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({"machine": machine(), "rounds": args.rounds, "models": models}, indent=2) + "\n")


if __name__ == "__main__":
    main()
