#!/usr/bin/env python3
"""Damage tiny checkpoints in thousands of ways and run convert, inspect, verify and reload over each.

    python scripts/bench/fuzz.py --cases 10000 --out scripts/bench/results/fuzz.json
    python scripts/bench/fuzz.py --case 4711          # one case again, with all that it said

Every case is a fork of one warm process, with 20 s of processor time a command, a minute of wall time in all that pass
without a word, and 2 GB. Asserted are: no traceback and no other exit code than the documented ones, one `error:` line
with each refusal, no hang, no more than 2 GB, no output that is called verified and does not load whole, nothing read
or written outside the folders of the case, nothing left behind. A case depends on the seed and its number alone.
"""

from __future__ import annotations

import argparse
import collections
import gc
import json
import os
import pickle
import platform
import select
import shutil
import signal
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from fuzzing import case
from fuzzing.models import BASES, loading_faults, make

WALL_SECONDS = 90.0
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


def fork_case(bases: Path, work: Path, seed: int, number: int, *, short: bool = False) -> dict[str, Any]:
    """Run a case in a fork; what it does not come back with is its fault."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            os.setsid()
            os.chdir(work)
            (work / "tmp").mkdir()
            tempfile.tempdir = str(work / "tmp")
            case.limit_memory()
            answer = pickle.dumps(case.run_case(bases, work, seed, number, short=short))
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(answer)
        finally:
            os._exit(0)
    os.close(writer)
    received, deadline = b"", time.monotonic() + WALL_SECONDS
    while time.monotonic() < deadline:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        part = os.read(reader, 1 << 20)
        if not part:
            break
        received += part
    else:
        part = b"late"
    os.close(reader)
    late = time.monotonic() >= deadline
    if late:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if received:
        try:
            found: dict[str, Any] = pickle.loads(received)  # what our own child wrote
            return found
        except Exception:
            pass
    what = (
        "hang: no answer in time"
        if late or status == -signal.SIGXCPU
        else f"traceback: the process ended with {status}"
    )
    return {"case": number, "base": "?", "mutations": [], "options": [], "codes": {}, "faults": [what]}


def summarise(results: list[dict[str, Any]], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Counts by kind of fault, by exit code of each command, and by base."""
    codes: dict[str, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    mutations: collections.Counter[str] = collections.Counter()
    for result in results:
        for step, code in result["codes"].items():
            codes[step][code] += 1
        mutations.update(done.split(" ")[0].split(".")[0] for done in result["mutations"])
    kinds = {kind: sum(any(f.startswith(kind) for f in r["faults"]) for r in results) for kind in KINDS}
    slowest = max((s for r in results for s in r.get("seconds", {}).values()), default=0.0)
    return {
        "what": "damaged tiny checkpoints through convert, inspect, verify and reload, each in a fork of one process",
        "command": f"python scripts/bench/fuzz.py --cases {options.cases} --seed {options.seed}",
        "cases": len(results),
        "stopped_after_s": options.seconds,
        "seed": options.seed,
        "faults": kinds,
        "cases_with_a_fault": sum(bool(r["faults"]) for r in results),
        "exit_codes": {
            step: {str(code): n for code, n in sorted(found.items())} for step, found in sorted(codes.items())
        },
        "reloaded_whole": sum(bool(r.get("reloaded")) for r in results),
        "bases": dict(sorted(collections.Counter(r["base"] for r in results).items())),
        "slowest_command_cpu_s": slowest,
        "largest_peak_mb": max((r.get("peak_mb", 0) for r in results), default=0),
        "wall_s": round(seconds, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("gqa-convert", "torch", "transformers", "safetensors")},
        },
        "examples": [
            {key: r[key] for key in ("case", "base", "mutations", "options", "faults")} for r in results if r["faults"]
        ][:20],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="run this one alone and print everything")
    parser.add_argument("--short", action="store_true", help="convert and reload alone, in nine cases of ten")
    parser.add_argument("--seconds", type=float, help="stop after about so long, whatever is left")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    numbers = range(options.first, options.first + options.cases) if options.case is None else [options.case]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        bases, work = Path(name) / "bases", Path(name) / "case"
        warm_up(bases, options.short)
        started, results = time.monotonic(), []
        for number in numbers:
            result = fork_case(bases, work, options.seed, number, short=options.short)
            results.append(result)
            if result["faults"] or options.case is not None:
                print(json.dumps(result), flush=True)
            if options.seconds and time.monotonic() - started > options.seconds:
                break
        summary = summarise(results, options, time.monotonic() - started)
    text = json.dumps(summary, indent=2)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    sys.exit(1 if summary["cases_with_a_fault"] else 0)


if __name__ == "__main__":
    main()
