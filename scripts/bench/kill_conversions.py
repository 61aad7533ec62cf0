#!/usr/bin/env python3
"""Kill conversions with SIGKILL at random moments, and check that the output is whole or not there, every time.

    python scripts/bench/kill_conversions.py --kills 1000 --out scripts/bench/results/kill_conversions.json

Every conversion is a fork of one warm process. Checked after each kill: the output is absent, or the one of before, or
the new one, byte for byte; the source is untouched; beside them lie only hidden leftovers of ours. Each kill is
followed by the same command run to its end, whose output must equal that of a run that was never disturbed, with
nothing left behind.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
from fuzzing import case, models

_WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
_FAST = ("--preset", "fast", "--calibrate", "self", "--calibration-sequences", "2", "--calibration-length", "16")


@dataclass(frozen=True)
class Scenario:
    """What is converted, with which options; `replacing` an earlier output of other groups; keeping `--work`."""

    base: str
    options: tuple[str, ...] = ("--groups", "2")
    replacing: bool = False
    work: bool = False


SCENARIOS = {
    "plain": Scenario("plain"),
    "sharded": Scenario("sharded"),
    "bin": Scenario("bin"),
    "replacing (--force)": Scenario("sharded", replacing=True),
    "fast with --work": Scenario("plain", ("--groups", "2", *_FAST), work=True),
}


def contents(folder: Path) -> dict[str, str]:
    """Names and hashes of a folder's files, without the lock that a run removes as its last act."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def fork_command(arguments: Sequence[object], seconds: float | None) -> int:
    """Run the command in a fork; kill it after `seconds`, if given. Returns its exit status, -9 if killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code, _, said, escaped = case.command(*arguments)
            if code:
                print(said, escaped, file=sys.__stderr__)
        finally:
            os._exit(code & 0xFF)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def check(condition: bool, what: str) -> None:
    """End with a message where something is not as it must be."""
    if not condition:
        raise SystemExit(f"BAD: {what}")


def kill_often(name: str, scenario: Scenario, root: Path, kills: int, rng: random.Random, end: float) -> dict[str, Any]:
    """Run one scenario's kills, no more after the clock shows `end`; returns counts of what was found after them."""
    source, out, work = root / "source", root / "out", root / "work"
    models.make(source, scenario.base, **_WIDE)
    untouched = contents(source)
    arguments = ["convert", source, "--out", out, "--no-measure", *scenario.options]
    arguments += ["--force"] if scenario.replacing else []
    arguments += ["--work", work] if scenario.work else []
    started = time.monotonic()
    check(fork_command(arguments, None) == 0, f"{name}: the undisturbed run failed")
    life, whole = time.monotonic() - started, contents(out)
    earlier: dict[str, str] | None = None
    if scenario.replacing:
        shutil.rmtree(out)
        check(
            fork_command(["convert", source, "--out", out, "--groups", "1", "--no-measure"], None) == 0,
            f"{name}: earlier",
        )
        earlier = contents(out)
        shutil.copytree(out, root / "earlier")
    counts = {
        "kills": 0,
        "ended before the kill": 0,
        "no output": 0,
        "earlier output": 0,
        "new output": 0,
        "set aside": 0,
    }
    while counts["kills"] < kills and time.monotonic() < end:
        shutil.rmtree(out, ignore_errors=True)
        if scenario.replacing:
            shutil.copytree(root / "earlier", out)
        if scenario.work and rng.random() < 0.7:
            shutil.rmtree(work, ignore_errors=True)
        status = fork_command(arguments, rng.uniform(0, 1.1 * life))
        counts["kills" if status == -signal.SIGKILL else "ended before the kill"] += 1
        check(status in (0, -signal.SIGKILL), f"{name}: exit status {status}")
        now = contents(out) if out.exists() else None
        strays = {path.name for path in root.iterdir()} - {"source", "out", "work", "earlier"}
        aside = any(stray.startswith(".out.old-") for stray in strays)
        check(now in (None, earlier, whole), f"{name}: half an output after a kill")
        check(not scenario.replacing or now is not None or aside, f"{name}: the earlier output is gone")
        check(all(stray.startswith((".out.tmp-", ".out.old-", ".out.work")) for stray in strays), f"{name}: {strays}")
        kind = "no output" if now is None else "new output" if now == whole else "earlier output"
        counts[kind] += 1
        counts["set aside"] += aside
        if not scenario.replacing:
            shutil.rmtree(out, ignore_errors=True)
        check(fork_command(arguments, None) == 0, f"{name}: the run after a kill failed")
        check(contents(out) == whole, f"{name}: the run after a kill gave other bytes")
        left = {path.name for path in root.iterdir()} - {"source", "out", "work", "earlier"}
        check(not left, f"{name}: {left} was left behind")
        check(contents(source) == untouched, f"{name}: the source was changed")
    return {**counts, "seconds_undisturbed": round(life, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="over all kinds of conversions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after about so long, kinds alike")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        warm = models.make(Path(name) / "warm", "plain")
        for number, chosen in enumerate((("--groups", 2), ("--groups", 2, *_FAST))):
            case.command("convert", warm, "--out", Path(name) / f"warm-{number}", "--no-measure", *chosen)
        gc.collect()
        gc.freeze()
        counts: dict[str, Any] = {}
        started = time.monotonic()
        for kind, scenario in SCENARIOS.items():
            root = Path(name) / f"kills-{len(counts)}"
            root.mkdir()
            end = started + options.seconds * (len(counts) + 1) / len(SCENARIOS)
            counts[kind] = kill_often(kind, scenario, root, options.kills // len(SCENARIOS), rng, end)
            print(kind, counts[kind], flush=True)
            shutil.rmtree(root)
    result = {
        "what": "SIGKILL at random moments of conversions, each followed by the same command run to its end",
        "command": f"python scripts/bench/kill_conversions.py --kills {options.kills} --seed {options.seed}",
        "stopped_after_s": options.seconds if options.seconds < float("inf") else None,
        "kills": sum(ends["kills"] for ends in counts.values()),
        "half_outputs": 0,
        "reruns_of_other_bytes": 0,
        "by_kind": counts,
        "wall_s": round(time.monotonic() - started, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("gqa-convert", "torch", "transformers", "safetensors")},
        },
    }
    text = json.dumps(result, indent=2)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
