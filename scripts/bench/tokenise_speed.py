#!/usr/bin/env python3
"""Show how fast a corpus is tokenised by one and by two processes, what a kill costs, and when the first step is taken.

    python scripts/bench/tokenise_speed.py MODEL --megabytes 100 --out scripts/bench/results/tokenise_speed.json

The corpus is sources of this Python's modules, each time under another first line, as .jsonl. Both counts of processes
tokenise it into a new folder in turn, `--repeats` times. Beside them, two runs of one process each at the same time,
which share nothing but the machine: that is the most that two processors give here. Then two processes are killed
(SIGKILL) when half of the parts are there, and started again: parts that were there must be the same files afterwards.
Last, `gqa uptrain` is started on MODEL for a step of one sequence: on the tokens that are there, while the corpus is
streamed, and from nothing; seconds from the start of the process to the end of its first step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

CONTEXT = 512


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", nargs=3, metavar=("TEXT", "FOLDER", "PROCESSES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        tokenise(args.model, *args.side)
        return
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        size = write_corpus(work / "text.jsonl", round(args.megabytes * 1e6))
        runs: dict[int, list[float]] = {1: [], 2: []}
        apart: list[float] = []
        for number, processes in itertools.product(range(args.repeats), runs):
            seconds = timed(args.model, work, f"run-{number}-{processes}", processes)
            runs[processes].append(size / 1e6 / seconds)
            print(f"{processes} processes: {runs[processes][-1]:.2f} MB/s", flush=True)
            if processes == 2:
                apart.append(2 * size / 1e6 / both_at_once(args.model, work, number))
                print(f"two runs of one process: {apart[-1]:.2f} MB/s", flush=True)
        result = {
            "what": "tokenising a corpus, and the time to the first step of training",
            "command": f"python scripts/bench/tokenise_speed.py {Path(args.model).name} --megabytes {args.megabytes:g}",
            "bytes": size,
            "megabytes_per_second": {str(count): [round(rate, 2) for rate in rates] for count, rates in runs.items()},
            "two_runs_at_once": [round(rate, 2) for rate in apart],
            "two_over_one": round(median(runs[2]) / median(runs[1]), 3),
            "most_over_one": round(median(apart) / median(runs[1]), 3),
            "killed": killed(args.model, work),
            "first_step_seconds": {
                "tokens are there": first_step(args.model, work, cache="run-0-2"),
                "streamed": first_step(args.model, work, streaming=True),
                "tokenised first": first_step(args.model, work, cache="new"),
            },
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {name: version(name) for name in ("gqa-convert", "torch", "transformers", "tokenizers")},
        }
    text = json.dumps(result, indent=1) + "\n"
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


def write_corpus(path: Path, size: int) -> int:
    """Write so many bytes of documents; returns how many there are."""
    from gqa_convert.data.stdlib import training_texts

    texts, written = [text for text in training_texts() if text], 0
    with open(path, "w", encoding="utf-8") as file:
        for number, text in enumerate(itertools.cycle(texts)):
            if written >= size:
                return written
            written += file.write(json.dumps({"text": f"# {number}\n{text}"}) + "\n")
    raise AssertionError("a cycle has no end")


def tokenise(model: str, text: str, folder: str, processes: str) -> None:
    """Make the stores, as `gqa uptrain` does; told what it does on standard output."""
    from gqa_convert.data.documents import SourceSpec, open_corpus
    from gqa_convert.data.encoding import Encoder
    from gqa_convert.hf.loading import Source
    from gqa_convert.uptrain.making import Making

    encoder = Encoder(Source.open(Path(model)).tokenizer())
    corpus = open_corpus(SourceSpec(kind="jsonl", paths=(text,)))
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    making = Making(root, encoder, lambda line: None, lambda: False, check=False, processes=int(processes))
    started = time.perf_counter()
    making.both(corpus, 0.01)
    print(json.dumps({"seconds": time.perf_counter() - started}))


def command(model: str, work: Path, folder: str, processes: int) -> list[str]:
    return [sys.executable, __file__, model, "--side", str(work / "text.jsonl"), str(work / folder), str(processes)]


def timed(model: str, work: Path, folder: str, processes: int) -> float:
    """Seconds of one tokenising, the start of Python and its libraries left out."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command(model, work, folder, processes), capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def both_at_once(model: str, work: Path, number: int) -> float:
    """Seconds of the slower of two runs of one process, started together."""
    with ThreadPoolExecutor(2) as pool:
        return max(pool.map(lambda side: timed(model, work, f"apart-{number}-{side}", 1), range(2)))


def killed(model: str, work: Path) -> dict[str, Any]:
    """Kill it half way, and see what the next start makes again."""
    parts = max(4, round((work / "text.jsonl").stat().st_size / (1 << 21)))
    arguments = command(model, work, "killed", 2)
    process = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL)
    before: dict[Path, tuple[int, int]] = {}
    while len(before) < parts // 2:
        if process.poll() is not None:
            raise SystemExit("it ended before half of the parts were there: give it more text")
        time.sleep(0.05)
        before = there(work / "killed")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = there(work / "killed")
    again = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    seen: dict[Path, tuple[int, int]] = {}
    while again.poll() is None:
        seen |= there(work / "killed")
        time.sleep(0.02)
    same = sorted(file.stat().st_size for file in (work / "killed").glob("*-*/*.bin")) == sorted(
        file.stat().st_size for file in (work / "run-0-2").glob("*-*/*.bin")
    )
    return {
        "parts_there": len(before),
        "made_again": sum(seen.get(path, mark) != mark for path, mark in before.items()),
        "ended": again.returncode == 0 and same,
    }


def there(folder: Path) -> dict[Path, tuple[int, int]]:
    """Parts that are whole, with what tells a file from one of the same name."""
    found = {}
    for path in folder.glob("*-parts/part-*.npz"):
        try:
            status = path.stat()
        except OSError:  # gone meanwhile
            continue
        found[path] = (status.st_ino, status.st_mtime_ns)
    return found


def first_step(model: str, work: Path, *, cache: str | None = None, streaming: bool = False) -> float:
    """Seconds from the start of `gqa uptrain` to the end of its first step."""
    output = work / f"steps-{cache}-{streaming}"
    settings = {
        "model": model,
        "output": str(output),
        "budget": {"steps": 1},
        "data": {
            "source": {"kind": "jsonl", "paths": [str(work / "text.jsonl")]},
            "context": CONTEXT,
            "held_out_fraction": 0.01,
            "streaming": streaming,
            **({"cache": str(work / cache)} if cache else {}),
        },
        "schedule": {"kind": "constant", "peak": 1e-4},
        "train": {"batch_sequences": 1, "micro_batch": 1, "device": "cpu"},
        "checkpoints": {"every_minutes": None},
        "evaluation": {"tokens": 2048},
        "log": {"trackers": [], "every_steps": 1},
    }
    path = work / "uptrain.json"
    path.write_text(json.dumps(settings))
    started = time.time()
    process = subprocess.Popen(
        [sys.executable, "-m", "gqa_convert.cli", "uptrain", str(path)], stdout=subprocess.DEVNULL
    )
    while process.poll() is None:
        if stepped(output / "metrics.jsonl"):
            seconds = time.time() - started
            process.send_signal(signal.SIGTERM)
            process.wait()
            return round(seconds, 1)
        time.sleep(0.05)
    if stepped(output / "metrics.jsonl"):
        return round(time.time() - started, 1)
    raise SystemExit(f"gqa uptrain ended with {process.returncode} before its first step")


def stepped(path: Path) -> bool:
    """Whether a step is on record."""
    return path.is_file() and '"kind": "train"' in path.read_text()


if __name__ == "__main__":
    main()
