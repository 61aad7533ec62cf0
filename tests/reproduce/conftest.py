"""The reproduction's modules can be imported by name, and results that look like a run's."""

import math
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts" / "reproduce"
sys.path.insert(0, str(SCRIPTS))

TOTAL = 1_000_000
MARKS = (1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


def made_curve(start, end, fall, last):
    """A loss that falls from `start` towards `end`."""
    marks = [0, *[mark for mark in MARKS if mark <= last]]
    return [[tokens, end + (start - end) * math.exp(-tokens / fall)] for tokens in marks]


def made_arms(shift):
    """Arms of one seed: mean starts 3 nats up and falls slowly, best starts nearly there."""
    from arms import ARMS

    starts = {"control": 4.0, "mean": 7.0, "first": 7.2, "random": 8.0, "aligned": 5.5, "pca": 4.8, "best": 4.05}
    found = {}
    for arm in ARMS:
        start = starts[arm.start] - (0.4 if arm.groups == "gqa" else 0.0)
        curve = made_curve(start + shift, 3.95 + shift, 15_000 if arm.start != "control" else 60_000, arm.alpha * TOTAL)
        found[arm.name] = arm.to_json() | {"curve": curve, "seconds": 10.0}
        if arm.start != "control":
            calibrated = 4000 if arm.start in ("aligned", "pca", "best") else 0
            found[arm.name] |= {"conversion_seconds": 1.0, "calibration_tokens": calibrated, "kv_heads": 1}
    return found


@pytest.fixture
def found():
    """What three seeds of one family give."""
    return {
        seed: {
            "pretraining": {
                size: {"curve": [[0, 7.6], [TOTAL, loss + shift]], "parameters": 1000, "seconds": 5.0}
                for size, loss in (("large", 4.0), ("small", 4.4))
            },
            "arms": made_arms(shift),
        }
        for seed, shift in enumerate((-0.02, 0.0, 0.02))
    }


@pytest.fixture
def results(found):
    """A results.json."""
    from dataclasses import asdict

    from scales import TINY

    def timed(names):
        return {
            "device": "cpu", "dtype": "float32", "threads": 2, "batch": 8, "context": 2048, "output_tokens": 512,
            "models": {
                name: {"kv_heads": heads, "seconds_per_sample": 0.1 + 0.01 * heads, "quartiles": [0.1, 0.2],
                       "cache_bytes": heads << 20, "time_ratio": 1.0}
                for name, heads in names.items()
            },
        }  # fmt: skip

    scale = asdict(TINY) | {"batch": 10, "context": 100, "steps": 1000}
    return {
        "command": "python scripts/reproduce/run.py",
        "machine": {"processor": "x86_64", "processors": 2, "system": "Linux", "load_average_at_the_end": [1.0] * 3},
        "versions": {"torch": "2"},
        "scale": scale,
        "decode": {
            "figure_6": timed({f"{heads} groups": heads for heads in (16, 8, 4, 2, 1)}),
            "table_1": timed({"MHA large": 8, "MHA small": 4, "GQA large": 2, "MQA large": 1}),
        },
        "families": {"decoder": {str(seed): value for seed, value in found.items()}},
    }
