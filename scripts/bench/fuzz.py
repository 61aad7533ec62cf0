#!/usr/bin/env python3
"""Damage tiny checkpoints in thousands of ways and run convert, inspect, verify and reload over each.

    python scripts/bench/fuzz.py --cases 10000 --out scripts/bench/results/fuzz.json
    python scripts/bench/fuzz.py --case 4711          # one case again, with all that it said

Every case is a fork of one warm process, with 20 s of processor time per command, five minutes of wall time in all (the
machine may be busy), and 2 GB. Asserted are: no traceback and no other exit code than the documented ones, one `error:`
line with each refusal, no hang, no more than 2 GB, no output that is called verified and does not load whole, nothing
read or written outside the folders of the case, nothing left behind. A case depends on the seed and its number alone.
"""

from __future__ import annotations

import argparse
import collections
import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from fuzzing import case, loop
from fuzzing.models import BASES, loading_faults, make
from warm import in_fork

WALL_SECONDS = 300.0
"""For a whole case of up to four commands, on a machine that others use too; their processor time is held to 20 s."""

KINDS = (
    "traceback",
    "exit code",
    "unclear",
    "hang",
    "memory",
    "does not load",
    "verify refuses",
    "outside",
    "left behind",
)


def warm_up(bases: Path, short: bool = False) -> None:
    """Make the bases, and run every command over each once, so that forks import nothing.

    `short`: only what most of the cases of the short form need.
    """
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for name, base in BASES.items():
        source, out = make(bases / name, name), bases / f"{name}-out"
        for method in ("mean",) if short else ("mean", "pca"):
            level = "structure" if short else "logits"
            chosen = ["--groups", base.groups[-1], "--method", method, "--verify", level]
            chosen += ["--no-flush", "--force", "--no-measure"]
            code, _, said, escaped = case.command("convert", source, "--out", out, *chosen)
            if code:
                raise SystemExit(f"the undamaged {name} does not convert: {said}{escaped}")
        for arguments in () if short else (("verify", source, out), ("inspect", source)):
            case.command(*arguments)
        faults = loading_faults(out)
        if faults:
            raise SystemExit(f"the converted {name} does not load: {faults}")
        shutil.rmtree(out)
    gc.collect()
    gc.freeze()


def fork_case(bases: Path, work: Path, seed: int, number: int, *, short: bool = False) -> loop.Case:
    """Run a case in a fork; what it does not come back with is its fault."""

    def run() -> loop.Case:
        os.chdir(work)
        (work / "tmp").mkdir()
        tempfile.tempdir = str(work / "tmp")
        case.limit_memory()
        return case.run_case(bases, work, seed, number, short=short)

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    outcome = in_fork(run, seconds=WALL_SECONDS)
    if outcome.value is not None:
        result: loop.Case = outcome.value
        return result
    hangs = outcome.fault in ("hang", f"the process ended with {-signal.SIGXCPU}")
    what = "hang: no answer in time" if hangs else f"traceback: {outcome.fault}"
    return {"case": number, "base": "?", "mutations": [], "options": [], "codes": {}, "faults": [what]}


def summarise(results: list[loop.Case], options: argparse.Namespace, seconds: float) -> loop.Case:
    """Counts by kind of fault, by exit code of each command, and by base."""
    codes: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for result in results:
        for step, code in result["codes"].items():
            codes[step][code] += 1
    return {
        "what": "damaged tiny checkpoints through convert, inspect, verify and reload, each in a fork of one process",
        "command": f"python scripts/bench/fuzz.py --cases {options.cases} --seed {options.seed}",
        "seed": options.seed,
        "first": options.first,
        "stopped_after_s": options.seconds,
        **loop.faults_of(results, KINDS),
        "exit_codes": {
            step: {str(code): n for code, n in sorted(counts.items())} for step, counts in sorted(codes.items())
        },
        "reloaded_whole": sum(bool(r.get("reloaded")) for r in results),
        "slowest_command_cpu_s": max((s for r in results for s in r.get("seconds", {}).values()), default=0.0),
        "largest_peak_mb": max((r.get("peak_mb", 0) for r in results), default=0),
        **loop.described(seconds, "gqa-convert", "torch", "transformers", "safetensors"),
        "examples": [
            {key: r[key] for key in ("case", "base", "mutations", "options", "faults")} for r in results if r["faults"]
        ][:20],
    }


def main() -> None:
    parser = loop.parser(__doc__, cases=300)
    parser.add_argument("--short", action="store_true", help="convert and reload alone, in nine cases of ten")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        bases, work = Path(name) / "bases", Path(name) / "case"
        warm_up(bases, options.short)
        results, seconds = loop.run_cases(
            options, lambda number: fork_case(bases, work, options.seed, number, short=options.short)
        )
        summary = summarise(results, options, seconds)
    loop.finish(summary, options.out)


if __name__ == "__main__":
    main()
