"""The one command for whoever has a GPU, tried out on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parents[2] / "scripts" / "gpu" / "check.sh"


def check(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", CHECK, *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_it_runs_on_the_cpu_goes_on_and_says_what_failed(tmp_path: Path) -> None:
    out = tmp_path / "check"
    pieces = ["convert-fast", "train", "train-distilled", "decode"]
    first = check("--cpu", "--out", out, "--only", *pieces[:2])
    assert first.returncode == 0, first.stdout + first.stderr
    second = check("--cpu", "--out", out, "--only", *pieces)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "convert-fast ..." not in second.stdout
    report = json.loads((out / "check.json").read_text())
    assert set(report["pieces"]) == set(pieces)
    assert report["device"]
    assert report["pieces"]["train"]["figures"]["tokens_per_second"] > 0
    assert report["pieces"]["train"]["figures"]["steps"] == 6
    (out / "train.json").unlink()
    (out / "grouped" / "model.safetensors").write_bytes(b"x")
    third = check("--cpu", "--out", out, "--only", "train", "--again")
    assert third.returncode == 1
    page = (out / "check.md").read_text()
    assert "FAILED (exit code 4)" in page
    assert "model.safetensors" in page


@pytest.mark.slow
def test_pieces_are_named_and_unknown_ones_refused(tmp_path: Path) -> None:
    assert "fsdp2:" in check("--list", "--out", tmp_path).stdout
    refused = check("--cpu", "--out", tmp_path, "--only", "nothing")
    assert refused.returncode == 2
    assert "no piece nothing" in refused.stderr
