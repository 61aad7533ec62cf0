"""A slice of scripts/bench/fuzz_training.py: damaged runs end in one line, with no traceback, hang or other weights."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "scripts" / "bench"


def test_a_slice_of_damaged_runs(tmp_path: Path) -> None:
    out = tmp_path / "fuzz.json"
    done = subprocess.run(
        [sys.executable, BENCH / "fuzz_training.py", "--cases", "20", "--seed", "11", "--out", out],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    outcome = json.loads(out.read_text())
    assert outcome["cases"] == 20
    assert set(outcome["faults"].values()) == {0}
