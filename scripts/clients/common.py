"""What every client check shares: the reference, and one line of JSON as the answer. Needs numpy only."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def log_softmax(logits: Any) -> Any:
    """Log-probabilities over the last axis, in float64."""
    x = np.asarray(logits, dtype=np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def main(values_of: Callable[[Path, list[int]], Any], version: Callable[[], str], *, logits: bool = True) -> None:
    """Run a client on the folder named on the command line and print the largest log-probability difference.

    Args:
        values_of: (folder, token ids) -> one row a position; what the client cannot give is NaN.
        version: the client's version.
        logits: the values are logits; False for log-probabilities.
    """
    folder = Path(sys.argv[1])
    reference = np.load(folder / "reference.npz")
    try:
        seen = np.asarray(values_of(folder, reference["ids"].tolist()), dtype=np.float64)
        answer = compare(log_softmax(seen) if logits else seen, log_softmax(reference["logits"]))
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    sys.stdout.write("\nANSWER " + json.dumps(answer | {"version": version()}) + "\n")


def compare(seen: Any, expected: Any) -> dict[str, Any]:
    """Largest difference of log-probabilities, and whether the most likely token is the same wherever it is known."""
    if seen.shape != expected.shape:
        raise ValueError(f"{seen.shape} values, the reference has {expected.shape}")
    whole = ~np.isnan(seen).any(-1)
    if np.isnan(seen).all():
        raise ValueError("no finite value")
    same = (seen[whole].argmax(-1) == expected[whole].argmax(-1)).all()
    return {"difference": float(np.nanmax(np.abs(seen - expected))), "same_first": bool(same)}
