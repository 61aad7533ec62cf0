"""Curves and arms that look like a run's."""

import math
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[2] / "scripts" / "reproduce"
TOTAL = 1_000_000
MARKS = (1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


def made_curve(start: float, end: float, fall: float, last: float) -> list[list[float]]:
    """A loss that falls from `start` towards `end`."""
    marks = [0, *[mark for mark in MARKS if mark <= last]]
    return [[tokens, end + (start - end) * math.exp(-tokens / fall)] for tokens in marks]


def made_arms(shift: float) -> dict[str, dict[str, Any]]:
    """Arms of one seed: mean starts 3 nats up and falls slowly, best starts nearly there."""
    from arms import ARMS

    starts = {"control": 4.0, "mean": 7.0, "first": 7.2, "random": 8.0, "aligned": 5.5, "pca": 4.8, "best": 4.05}
    arms = {}
    for arm in ARMS:
        start = starts[arm.start] - (0.4 if arm.groups == "gqa" else 0.0)
        curve = made_curve(start + shift, 3.95 + shift, 15_000 if arm.start != "control" else 60_000, arm.alpha * TOTAL)
        arms[arm.name] = arm.to_json() | {"curve": curve, "seconds": 10.0}
        if arm.start != "control":
            calibrated = 4000 if arm.start in ("aligned", "pca", "best") else 0
            arms[arm.name] |= {"conversion_seconds": 1.0, "calibration_tokens": calibrated, "kv_heads": 1}
    return arms
