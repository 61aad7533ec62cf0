"""What every engine check shares: a process per folder, the reference, a line of JSON as the answer. Needs numpy only.

An engine is imported once; a child of that process loads each folder, so that a crash or a wait costs one answer.
"""

from __future__ import annotations

import json
import os
import select
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LIMIT_S = 300
TAIL = 300  # characters of an error that are kept


def log_softmax(logits: Any) -> Any:
    """Log-probabilities over the last axis, in float64."""
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def main(values_of: Callable[[Path, list[int]], Any], version: Callable[[], str], *, logits: bool = True) -> None:
    """Run an engine on every folder named on the command line and print how far its log-probabilities are off.

    Args:
        values_of: (folder, token ids) -> one row per position, what the engine cannot give being NaN; or a pair of
            that and a dict of what else was seen (bytes of the cache).
        version: the engine's version.
        logits: the values are logits; False for log-probabilities.
    """
    for folder in map(Path, sys.argv[1:]):
        answer = _in_a_child(lambda folder=folder: _answer(values_of, folder, logits))  # type: ignore[misc]
        sys.stdout.write("\nANSWER " + json.dumps({"folder": str(folder), "version": version()} | answer) + "\n")
        sys.stdout.flush()


def source_ids(folder: Path) -> list[int] | None:
    """What the encoder of an encoder-decoder reads; None for a decoder."""
    reference = np.load(folder / "reference.npz")
    return reference["source_ids"].tolist() if "source_ids" in reference else None


def compare(seen: Any, expected: Any) -> dict[str, Any]:
    """Largest difference of log-probabilities, and whether the most likely token is the same wherever it is known."""
    if seen.shape != expected.shape:
        raise ValueError(f"{seen.shape} values, the reference has {expected.shape}")
    whole = ~np.isnan(seen).any(-1)
    if np.isnan(seen).all():
        raise ValueError("no finite value")
    same = (seen[whole].argmax(-1) == expected[whole].argmax(-1)).all()
    return {"difference": float(np.nanmax(np.abs(seen - expected))), "same_first": bool(same)}


def _answer(values_of: Callable[[Path, list[int]], Any], folder: Path, logits: bool) -> dict[str, Any]:
    reference = np.load(folder / "reference.npz")
    try:
        values = values_of(folder, reference["ids"].tolist())
        values, more = values if isinstance(values, tuple) else (values, {})
        seen = np.asarray(values, dtype=np.float64)
        if "error" in more:
            failure: dict[str, Any] = more
            return failure
        measured: dict[str, Any] = compare(log_softmax(seen) if logits else seen, log_softmax(reference["logits"]))
        measured.update(more)
        return measured
    except Exception as error:
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:TAIL]}"}


def _in_a_child(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `run` returns, computed by a child; what it last said where it dies or takes too long."""
    sys.stdout.flush()
    reading, writing = os.pipe()
    with tempfile.TemporaryFile("w+b") as said:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            with os.fdopen(writing, "w") as pipe:
                pipe.write(json.dumps(run()))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            late = not select.select([pipe], [], [], LIMIT_S)[0]
            text = "" if late else pipe.read()
        if late:
            os.killpg(child, 9)
        status = os.waitpid(child, 0)[1]
        if text:
            answer: dict[str, Any] = json.loads(text)
            return answer
        said.seek(0)
        last = " ".join(said.read().decode(errors="replace").split())[-TAIL:]
    return {"error": f"no answer in {LIMIT_S} s" if late else f"died ({os.waitstatus_to_exitcode(status)}): {last}"}
