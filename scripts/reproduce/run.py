#!/usr/bin/env python
"""Repeat the ablations of Ainslie et al. 2023 on models trained here, and set the better starts beside them.

    python scripts/reproduce/run.py --scale tiny --out runs/reproduce          # all of it
    python scripts/reproduce/run.py --scale small --out runs/small --minutes 9 # a piece; again until exit code 0

Everything is cached under OUT by the hash of its settings: after an interruption (or exit code 75, when --minutes are
over) the same command goes on. At the end OUT has results.json, RESULTS.md and the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from chain import Chain
from pieces import IN_ONE_GO, Pieces
from scales import SCALES, Scale, Scales
from untrained import FAMILIES

from gqa_convert.errors import GQAConvertError, Preempted, UsageError

AGAIN = Preempted.exit_code


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="tiny")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pieces and of the results")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="not all of them")
    parser.add_argument("--seeds", nargs="+", type=int, help="other seeds than the scale's")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side (1 for one GPU)")
    parser.add_argument("--minutes", type=float, help="save, and stop with exit code 75, after this long")
    parser.add_argument("--shrink", type=int, default=1, help="divide lengths and sizes by this (to try it out)")
    parser.add_argument("--report", action="store_true", help="run no more; report what is finished")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def chosen_scales(args: argparse.Namespace) -> Scales:
    """The scale of every family that is wanted, with what the command line changes of it."""
    return {family: changed(SCALES[args.scale][family], args) for family in args.families}


def changed(scale: Scale, args: argparse.Namespace) -> Scale:
    """A scale as the command line wants it."""
    if args.seeds:
        scale = replace(scale, seeds=tuple(args.seeds))
    return shrunk(scale, args.shrink) if args.shrink > 1 else scale


def shrunk(scale: Scale, by: int) -> Scale:
    """A scale that shows that everything runs, and nothing else."""
    decode = replace(scale.decode, context=max(16, scale.decode.context // by), shape=scale.small, rounds=2, steps=1)
    return replace(
        scale,
        large=replace(scale.small, layers=max(1, scale.small.layers)),
        small=replace(scale.small, layers=1),
        steps=max(10, scale.steps // by),
        held_out_tokens=max(512, scale.held_out_tokens // by),
        calibration_sequences=max(16, scale.calibration_sequences // by),
        refit_steps=max(2, scale.refit_steps // by),
        decode=decode,
    )


def tell(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def check_matplotlib() -> None:
    """Make sure, before hours are spent, that the figures can be drawn."""
    if find_spec("matplotlib") is None:
        error = UsageError("the figures are drawn with matplotlib: pip install 'gqa-convert[report]'.")
        tell(str(error))
        raise SystemExit(error.exit_code)


def run_one(args: argparse.Namespace, scales: Scales) -> None:
    """Run one family and seed in this process."""
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.jobs))
    family, seed = args.only.split(":")
    Chain(Pieces(args.out, tell), scales[family], family, int(seed)).run()


def hide_progress() -> None:
    """No bars of transformers: there are hundreds of small models."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def stop_after(minutes: float | None) -> None:
    """Ask this process to stop after so many minutes, as SIGTERM does: an uptraining saves, all else starts again."""

    def stop(*_: Any) -> None:
        raise Preempted("time is over: run the same command again to go on.")

    signal.signal(signal.SIGTERM, stop)
    if minutes is not None:
        timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
        timer.daemon = True
        timer.start()


def run_all(args: argparse.Namespace, scales: Scales) -> bool:
    """Run every family and seed, some side by side; False if time was over before all were done."""
    started, empty = time.monotonic(), not any(args.out.iterdir())
    # The family that takes longest comes first, so that at the end no process has long to go on alone.
    waiting = [f"{family}:{seed}" for family, scale in scales.items() for seed in scale.seeds]
    running: list[subprocess.Popen[bytes]] = []
    codes: list[int] = []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", waiting.pop(0)]
            if args.minutes is not None:
                left = args.minutes - (time.monotonic() - started) / 60
                command += ["--minutes", f"{max(left, 0.01):.2f}"]
            running.append(subprocess.Popen(command))
        while all(process.poll() is None for process in running):
            time.sleep(0.2)
        codes += [process.returncode for process in running if process.returncode is not None]
        running = [process for process in running if process.returncode is None]
        if any(code not in (0, AGAIN) for code in codes):
            for process in running:
                process.terminate()
                process.wait()
            raise SystemExit(1)
        if args.minutes is not None and time.monotonic() - started > 60 * args.minutes:
            waiting = []
            codes.append(AGAIN)
    finished = AGAIN not in codes
    if finished and empty:
        in_one_go = {"minutes": round((time.monotonic() - started) / 60, 1), "jobs": args.jobs}
        (args.out / IN_ONE_GO).write_text(json.dumps(in_one_go) + "\n", encoding="utf-8")
    return finished


def main() -> None:
    args = parse_arguments(sys.argv[1:])
    scales = chosen_scales(args)
    check_matplotlib()
    args.out.mkdir(parents=True, exist_ok=True)
    stop_after(args.minutes if args.only else None)
    try:
        if args.only:
            hide_progress()
            run_one(args, scales)
        elif not args.report and not run_all(args, scales):
            tell("time is over: run the same command again to go on")
            raise SystemExit(AGAIN)
        else:
            from results_page import write_report

            hide_progress()
            write_report(args, scales)
    except GQAConvertError as error:
        tell(str(error))
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
