"""The whole of it, shrunk until it says nothing and takes minutes: stopped, gone on with, and reported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.reproduce.made_results import SCRIPTS


def run(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, SCRIPTS / "run.py", "--out", out, "--shrink", "60", "--seeds", "0", "1", *more],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_nothing_finished_is_nothing_reported(tmp_path: Path) -> None:
    from arms import ARMS
    from chain import Chain
    from pieces import Pieces
    from scales import SCALES

    assert len({arm.name for arm in ARMS}) == len(ARMS)
    for scales in SCALES.values():
        for family, scale in scales.items():
            assert Chain(Pieces(tmp_path, finished_only=True), scale, family, 0).finished() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", ["decoder", "t5"])
@pytest.mark.parametrize("name", ["tiny", "small"])
def test_the_settings_of_every_scale_are_a_configuration(name: str, family: str, tmp_path: Path) -> None:
    from scales import SCALES
    from training import settings

    from gqa_convert.uptrain.read_config import parse_config

    scale = SCALES[name][family]
    configuration = settings(
        scale, family, model=tmp_path, output=tmp_path / "run", seed=0, start_step=scale.steps, steps=5
    )
    config = parse_config(configuration)
    # Uptraining continues the pretraining's learning rate, and alpha is a share of its steps.
    assert config.schedule.start_step == scale.steps
    assert config.schedule.warmup_tokens == 0
    assert scale.steps_of(0.05) * scale.batch_tokens == pytest.approx(0.05 * scale.pretraining_tokens)
    assert scale.pretraining_tokens * max(scale.alphas) == scale.steps_of(max(scale.alphas)) * scale.batch_tokens


@pytest.mark.slow
def test_stopped_gone_on_with_and_reported(tmp_path: Path) -> None:
    stopped = run(tmp_path, "--minutes", "0.3")
    assert stopped.returncode == 75, stopped.stderr
    assert not (tmp_path / "results.json").exists()
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["families"]) == ["decoder", "t5"]
    for seeds in results["families"].values():
        assert list(seeds) == ["0", "1"]
        for seed in seeds.values():
            assert len(seed["arms"]) == 12
            for arm in seed["arms"].values():
                tokens = [tokens for tokens, _ in arm["curve"]]
                assert tokens == sorted(set(tokens))
                assert tokens[0] == 0
    assert "Figure 5" in (tmp_path / "RESULTS.md").read_text()
    assert len(list((tmp_path / "figures").glob("*.png"))) == 7
    # Everything is there: nothing is trained again.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert run(tmp_path).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == before
