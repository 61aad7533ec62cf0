"""A slice of the damaged checkpoints of scripts/bench/fuzz.py: no traceback, no hang, nothing false or outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "fuzz.py"
CASES = 300


def test_a_slice_of_damaged_checkpoints(tmp_path: Path) -> None:
    """In a process of its own, whose forks the cases are: this one may hold threads, which do not survive a fork."""
    out = tmp_path / "fuzz.json"
    arguments = ["--cases", str(CASES), "--seed", "2026", "--short", "--out", str(out)]
    finished = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert out.exists(), finished.stderr[-3000:]
    summary = json.loads(out.read_text())
    assert summary["cases"] == CASES
    assert not any(summary["faults"].values()), json.dumps(summary["examples"], indent=2)[:5000]
    assert summary["cases_with_a_fault"] == 0
    assert finished.returncode == 0
    # Both refusals and conversions must be among them, or the cases test nothing.
    assert summary["exit_codes"]["convert"].keys() >= {"0", "4", "5"}
    assert summary["reloaded_whole"] >= CASES // 10
