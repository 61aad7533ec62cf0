"""Cases by number, each judged by itself: the command line, the loop and the summary that fuzz scripts share."""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Case = dict[str, Any]


def parser(description: str | None, *, cases: int) -> argparse.ArgumentParser:
    """The options of every fuzz script; `cases` is the default number."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", type=int, default=cases)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--first", type=int, default=0, help="number of the first case")
    options.add_argument("--case", type=int, help="run this one alone and print everything")
    options.add_argument("--seconds", type=float, help="stop after about so long, whatever is left")
    options.add_argument("--out", type=Path)
    return options


def run_cases(options: argparse.Namespace, judge: Callable[[int], Case]) -> tuple[list[Case], float]:
    """Judge the cases that the options name, and print those with a fault; returns them and the seconds it took.

    Interrupted (Ctrl-C), it ends with the cases so far.
    """
    alone = options.case is not None
    started, results = time.monotonic(), []
    for number in [options.case] if alone else range(options.first, options.first + options.cases):
        try:
            result = judge(number)
        except KeyboardInterrupt:
            break
        results.append(result)
        if result["faults"] or alone:
            print(json.dumps(result), flush=True)
        if options.seconds and time.monotonic() - started > options.seconds:
            break
    return results, time.monotonic() - started


def faults_of(results: Sequence[Case], kinds: Iterable[str]) -> Case:
    """How many cases there were, how many with a fault, and of which kind."""
    return {
        "cases": len(results),
        "faults": {kind: sum(any(f.startswith(kind) for f in r["faults"]) for r in results) for kind in kinds},
        "cases_with_a_fault": sum(bool(r["faults"]) for r in results),
        "bases": dict(sorted(collections.Counter(r["base"] for r in results).items())),
    }


def described(seconds: float, *packages: str) -> Case:
    """How long it took, where, and with what."""
    return {
        "wall_s": round(seconds, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def finish(summary: Case, out: Path | None) -> None:
    """Print and keep a summary, and exit: with 1 if a case had a fault."""
    text = json.dumps(summary, indent=2)
    if out:
        out.write_text(text + "\n", encoding="utf-8")
    print(text)
    sys.exit(1 if summary["cases_with_a_fault"] else 0)
