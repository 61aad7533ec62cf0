#!/usr/bin/env python3
"""Damage configurations, text, tokens, models and checkpoints of tiny runs in thousands of ways; train with each.

    python scripts/bench/fuzz_training.py --cases 2000 --out scripts/bench/results/fuzz_training.json
    python scripts/bench/fuzz_training.py --case 471          # one case again, with all that it said

Every case is a fork of one warm process in a folder of its own, where a run has been stopped half way. The run is asked
to stop (SIGTERM) after 10 seconds and killed after 20. Asserted are: no traceback, no other exit code than the
documented ones, one `error:` with each refusal, no hang, no more than 2 GB, no code run out of a pickle, nothing left
half written; and that a run which ends well after damage to its text, tokens, metrics or checkpoints has exactly the
weights of the run that was never disturbed. A case depends on the seed and its number alone.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from functools import partial
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import torch
import transformers
import yaml
from damage_training import BASES, SAME_WEIGHTS, mutate
from fuzzing import loop
from tiny_run import make_model, make_text
from warm import import_all, in_fork

SECONDS, PATIENCE, MEGABYTES = 20.0, 10.0, 2048
CODES = {0, 2, 3, 4, 5, 6, 7, 8, 75}
KINDS = ("traceback", "exit code", "unclear", "hang", "memory", "code was run", "other weights", "left behind", "died")


def train(*overrides: str) -> tuple[int, str]:
    """`gqa uptrain run.yaml` in this process: exit code and what it wrote; 1 with the traceback if it had one."""
    from gqa_convert.cli.main import app
    from gqa_convert.cli.running import run_command

    threading.Timer(PATIENCE, os.kill, (os.getpid(), signal.SIGTERM)).start()
    sys.argv = ["gqa", "uptrain", "run.yaml", *(part for text in overrides for part in ("--set", text))]
    code = 0
    with (
        open("said", "w", encoding="utf-8") as said,
        contextlib.redirect_stderr(said),
        contextlib.redirect_stdout(said),
    ):
        try:
            run_command(app)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
            code = 1
    return code, Path("said").read_text(encoding="utf-8")


def make_bases(folder: Path) -> list[str]:
    """Stop each base's run half way, and finish a copy of it. Returns the modules that this took."""
    modules: list[str] = []
    for name, changes in BASES.items():
        base = folder / name
        make_model(base / "model")
        make_model(base / "teacher", kv_heads=4, seed=1)
        make_text(base / "data")
        (base / "run.yaml").write_text(yaml.safe_dump(changes, sort_keys=False))
        outcome = in_fork(partial(_half, base, name == "shards"), seconds=120)
        if outcome.fault or outcome.value is None:
            raise SystemExit(f"{name}: {outcome.fault}")
        modules = outcome.value
        whole = folder / f"{name}-whole"
        shutil.copytree(base, whole)
        outcome = in_fork(partial(_train_in, whole), seconds=120)
        if outcome.value is None or outcome.value[0] != 0:
            raise SystemExit(f"the undamaged run of {name} fails: {outcome}")
    return modules


def _train_in(folder: Path) -> Any:
    os.chdir(folder)
    return train()


def _half(base: Path, shards: bool) -> list[str]:
    from gqa_convert.uptrain import loop as training

    os.chdir(base)
    patched: Any = training
    real = patched.train_step
    patched.train_step = lambda parts, guards, at, **rest: real(parts, guards, at, **{**rest, "stop": at + 1 == 4})
    if shards:
        from gqa_convert.uptrain import shards as sharded
        from gqa_convert.uptrain import state

        # As a sharded engine writes them; one process is enough for torch's format.
        writers: Any = state
        writers.save_whole = sharded.save_shards
    code, said = train()
    if code != 75:
        raise SystemExit(f"{base.name} did not stop half way: {code} {said}")
    Path("said").unlink()
    return sorted(sys.modules)


def run_case(bases: Path, work: Path, seed: int, number: int) -> dict[str, Any]:
    """One case: damage, train, judge."""
    draw = random.Random(f"{seed} {number}")
    name = draw.choice(list(BASES))
    shutil.copytree(bases / name, work, symlinks=True)
    os.chdir(work)
    (work / "tmp").mkdir()
    tempfile.tempdir = str(work / "tmp")
    kind, done, overrides, exact = mutate(draw, work)
    (work / "tmp" / "done").write_text(json.dumps([name, kind, done]))
    with open(work / "tmp" / "stack", "w", encoding="utf-8") as stack:
        faulthandler.dump_traceback_later(SECONDS - 1, file=stack)
        code, said = train(*overrides)
        faulthandler.cancel_dump_traceback_later()
    faults = []
    if "Traceback (most recent call last)" in said:
        faults.append("traceback: " + said.strip().splitlines()[-1][:300])
    elif code not in CODES:
        faults.append(f"exit code {code}: {said[-200:]}")
    elif code and (said.count("error: ") < 1 or said.count("\nerror: ") + said.startswith("error: ") != 1):
        faults.append(f"unclear: code {code} with {said[-300:]!r}")
    if (work / "harmed").exists():
        faults.append("code was run")
    left = [p.name for p in work.rglob(".*") if p.name.startswith((".saving-", ".final.")) or ".tmp-" in p.name]
    if left and code == 0:
        faults.append(f"left behind: {left[:3]}")
    if code == 0 and exact and kind in SAME_WEIGHTS and not _same(work, bases / f"{name}-whole"):
        faults.append("other weights than those of the run that was never disturbed")
    return {
        "case": number,
        "base": name,
        "kind": kind,
        "done": done,
        "code": code,
        "faults": faults,
        "said": said[-600:],
    }


def _same(one: Path, two: Path) -> bool:
    weights = [folder / "run" / "final" / "model.safetensors" for folder in (one, two)]
    return weights[0].read_bytes() == weights[1].read_bytes()


def judge(bases: Path, work: Path, seed: int, number: int) -> dict[str, Any]:
    """Run a case in a fork; what it does not come back with is its fault."""
    outcome = in_fork(lambda: run_case(bases, work, seed, number), seconds=SECONDS)
    result: dict[str, Any] | None = outcome.value
    if result is None:
        done = work / "tmp" / "done"
        name, kind, damage = json.loads(done.read_text()) if done.is_file() else ("?", "?", [])
        stack = work / "tmp" / "stack"
        said = stack.read_text()[-3000:] if stack.is_file() else ""
        result = {"case": number, "base": name, "kind": kind, "done": damage, "code": None, "faults": [], "said": said}
    if outcome.fault == "the process ended with -15":
        result["code"] = -15  # asked to stop before there was anything to save, which ends a process
    elif outcome.fault:
        result["faults"].append("hang" if outcome.fault == "hang" else f"died: {outcome.fault}")
    if outcome.peak_mb > MEGABYTES:
        result["faults"].append(f"memory: {outcome.peak_mb} MB")
    result |= {"seconds": round(outcome.seconds, 2), "peak_mb": outcome.peak_mb}
    shutil.rmtree(work, ignore_errors=True)
    return result


def summarise(results: list[loop.Case], options: argparse.Namespace, seconds: float) -> loop.Case:
    """Counts by kind of fault, by kind of damage and by exit code."""
    codes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for result in results:
        codes[result["kind"]][str(result["code"])] += 1
    everywhere: collections.Counter[str] = sum(codes.values(), collections.Counter())
    return {
        "what": "damaged configurations, text, tokens, models and checkpoints of tiny runs, each in a fork",
        "command": "python scripts/bench/fuzz_training.py "
        f"--first {options.first} --cases {len(results)} --seed {options.seed}",
        "seed": options.seed,
        **loop.faults_of(results, KINDS),
        "exit_codes": dict(sorted(everywhere.items())),
        "exit_codes_by_damage": {kind: dict(sorted(counts.items())) for kind, counts in sorted(codes.items())},
        "slowest_s": max(r["seconds"] for r in results),
        "largest_peak_mb": max(r["peak_mb"] for r in results),
        **loop.described(seconds, "gqa-convert", "torch", "transformers", "accelerate", "datasets"),
    }


def main() -> None:
    options = loop.parser(__doc__, cases=100).parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="fuzz-training-") as name:
        bases = Path(name) / "bases"
        import_all(["gqa_convert.uptrain.loop", "gqa_convert.cli.main", "accelerate", "datasets"])
        import_all(make_bases(bases))
        results, seconds = loop.run_cases(
            options, lambda number: judge(bases, Path(name) / "case", options.seed, number)
        )
        summary = summarise(results, options, seconds)
    loop.finish(summary, options.out)


if __name__ == "__main__":
    main()
