"""Every anchor, shrunk: the whole command on the package's own model, with what was published and what was not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import script_module

SCRIPTS = Path(__file__).parents[2] / "scripts" / "anchors"
NAMES = list(script_module(SCRIPTS / "published.py").ANCHORS)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "run.py"), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_shrunk(name: str, tmp_path: Path) -> None:
    anchor = script_module(SCRIPTS / "published.py").ANCHORS[name]
    done = run(name, "--shrunk", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.split())
    for line in (*anchor.rival, *anchor.left):
        assert " ".join(line.split()) in said
    assert f"not run: {anchor.model}; these are figures of the package's own small model" in said
    results = json.loads((tmp_path / "results.json").read_text())
    evaluation = results["evaluation"]
    names = [pair["model"]["name"] for pair in evaluation["converted"]]
    assert names[: len(anchor.variants)] == list(anchor.variants)
    assert {pair["cache_ratio"] for pair in evaluation["converted"][: len(anchor.variants)]} == {0.25}
    by_name = {pair["model"]["name"]: pair["loss_difference"] for pair in evaluation["converted"]}
    assert by_name["best"] < by_name["mean"], "fitted to the original, it loses less"
    assert bool(evaluation["suite"]) == bool(anchor.tasks)
    if anchor.control:
        assert results["uptrained_tokens"] > 0
        trained = {pair["model"]["name"]: pair["cache_ratio"] for pair in evaluation["converted"][2:]}
        assert trained == {"original-trained-model": 1.0, "best-trained-model": 0.25}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    done = run("jin", "--out", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip() == "--data is missing: name the text to measure on."
