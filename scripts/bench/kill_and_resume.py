#!/usr/bin/env python3
"""Kill a run with SIGKILL at random moments, again and again, and check that every start finds a whole checkpoint.

    python scripts/bench/kill_and_resume.py CONFIG --kills 30 --out results.json [--set a.b=c ...]

CONFIG is a short run of `gqa uptrain`; it is given a fresh output and saves every few steps. After the kills it is left
to finish, and its weights are compared, bit by bit, with those of a run that was never disturbed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import random
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from gqa_convert.uptrain.checkpoints import MARKER, CheckpointStore
from gqa_convert.uptrain.loop import uptrain
from gqa_convert.uptrain.metrics import read_metrics
from gqa_convert.uptrain.read_config import load_config


def start(options: argparse.Namespace, output: Path, cache: Path) -> Any:
    """Start the run in a process of its own, forked so that imports are paid for once."""
    process = multiprocessing.get_context("fork").Process(target=train, args=(options, output, cache))
    process.start()
    return process


def train(options: argparse.Namespace, output: Path, cache: Path) -> None:
    sets = [
        *options.set,
        f"output={output}",
        f"data.cache={cache}",
        f"checkpoints.every_steps={options.every}",
        "log.trackers=[]",
    ]
    uptrain(load_config(options.config, sets), quiet=True)


def steps_logged(output: Path) -> int:
    path = output / "metrics.jsonl"
    return max((r["step"] for r in read_metrics(path)), default=0) if path.exists() else 0


def kill_once(options: argparse.Namespace, output: Path, cache: Path, rng: random.Random) -> dict[str, Any] | None:
    """Start, wait for the first step of this start, kill at a random moment after it; None if it finished first."""
    store = CheckpointStore(output / "checkpoints", 2)
    begun = store.newest()
    before = begun.step if begun else 0
    log = output / "metrics.jsonl"
    seen = log.stat().st_mtime_ns if log.exists() else 0
    run = start(options, output, cache)
    # Until the log is rewound it still has the steps of the run that was killed.
    while run.is_alive() and (not log.exists() or log.stat().st_mtime_ns == seen or steps_logged(output) <= before):
        time.sleep(0.01)
    run.join(rng.uniform(0, options.spread))
    if not run.is_alive():
        if run.exitcode:
            raise SystemExit(f"the run ended with {run.exitcode}")
        return None
    run.kill()
    run.join()
    found = store.newest()
    if found is None or found.step < before:
        raise SystemExit(f"after a kill the newest whole checkpoint is {found}, it was step {before}")
    half = [p.name for p in (output / "checkpoints").iterdir() if not (p / MARKER).is_file()]
    return {"resumed_from": before, "killed_after_step": steps_logged(output), "newest_whole": found.step,
            "unfinished_save": bool(half)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--spread", type=float, default=2.0, help="seconds after the first step within which to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    torch.set_num_threads(1)  # threads do not survive a fork
    transformers.logging.set_verbosity_error()
    for name in ("accelerate", "datasets", "transformers.models.llama.modeling_llama", "gqa_convert.uptrain.build"):
        importlib.import_module(name)  # before forking
    getattr(transformers, "AutoTokenizer")  # noqa: B009 - lazily imported
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        kills: list[dict[str, Any]] = []
        finished = 0
        while len(kills) < options.kills:
            output = work / f"run-{finished}"
            found = kill_once(options, output, work / "tokens", rng)
            if found is None:
                finished += 1  # it got to the end between two kills: begin anew
                continue
            kills.append(found)
            print(f"kill {len(kills)}: {found}", flush=True)
        last = work / f"run-{finished}"
        undisturbed = work / "undisturbed"
        for output in (last, undisturbed):
            run = start(options, output, work / "tokens")
            run.join()
        one, two = ((folder / "final" / "model.safetensors").read_bytes() for folder in (last, undisturbed))
    result = {
        "what": "SIGKILL at random moments of training; every start resumed from a whole checkpoint",
        "config": options.config.name,
        "kills": len(kills),
        "whole_after_every_kill": True,
        "killed_while_saving": sum(kill["unfinished_save"] for kill in kills),
        "bitwise_equal_to_an_undisturbed_run": one == two,
        "versions": {n: version(n) for n in ("gqa-convert", "torch", "transformers", "accelerate")},
        "runs": kills,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=2))
    raise SystemExit(0 if one == two else 1)


if __name__ == "__main__":
    main()
