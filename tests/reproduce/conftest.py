"""The reproduction's modules can be imported by name, and results that look like a run's."""

import sys
from typing import Any

import pytest

from tests.reproduce.made_results import SCRIPTS, TOTAL, made_arms

sys.path.insert(0, str(SCRIPTS))


@pytest.fixture
def seeds_found() -> dict[int, dict[str, Any]]:
    """What three seeds of one family give."""
    return {
        seed: {
            "processor_seconds": 60.0,
            "pretraining": {
                size: {"curve": [[0, 7.6], [TOTAL, loss + shift]], "parameters": 1000, "seconds": 5.0}
                for size, loss in (("large", 4.0), ("small", 4.4))
            },
            "arms": made_arms(shift),
        }
        for seed, shift in enumerate((-0.02, 0.0, 0.02))
    }


@pytest.fixture
def results(seeds_found: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """A results.json."""
    from dataclasses import asdict

    from scales import SCALES

    def timed(names: dict[str, int]) -> dict[str, Any]:
        return {
            "device": "cpu", "dtype": "float32", "threads": 2, "batch": 8, "context": 2048, "output_tokens": 512,
            "models": {
                name: {"kv_heads": heads, "seconds_per_sample": 0.1 + 0.01 * heads, "quartiles": [0.1, 0.2],
                       "cache_bytes": heads << 20, "time_ratio": 1.0}
                for name, heads in names.items()
            },
        }  # fmt: skip

    times = timed({"MHA large": 8, "MHA small": 4, "GQA large": 2, "MQA large": 1})
    seeds = {str(seed): value for seed, value in seeds_found.items()}
    scales = {
        family: asdict(scale) | {"batch": 10, "context": 100, "steps": 1000} for family, scale in SCALES["tiny"].items()
    }
    return {
        "command": "python scripts/reproduce/run.py",
        "machine": {"processor": "x86_64", "processors": 2, "system": "Linux", "load_average_at_the_end": [1.0] * 3},
        "versions": {"torch": "2"},
        "scales": scales,
        "decode": {
            "figure_6": timed({f"{heads} groups": heads for heads in (16, 8, 4, 2, 1)}),
            "table_1": {"decoder": times, "t5": times},
        },
        "families": {"decoder": seeds, "t5": seeds},
    }
