"""The demo from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from gqa_convert.checkpoint.embedded import CHECKPOINT
from gqa_convert.demo import recovery
from gqa_convert.demo.run import DemoResult, run_demo
from gqa_convert.errors import OutputError


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> DemoResult:
    with pytest.MonkeyPatch.context() as patch:  # 20 steps, however fast the machine is
        patch.setattr(recovery, "_step_seconds", lambda folder: 0.1)
        return run_demo(tmp_path_factory.mktemp("demo") / "two", uptrain_seconds=2, json=True)


def test_result(result: DemoResult) -> None:
    assert (result.heads, result.groups) == (8, 2)
    assert result.before.kv_cache_bytes_per_token == 4 * result.after.kv_cache_bytes_per_token
    assert result.loss_rise == result.after.held_out_loss - result.before.held_out_loss > 0.05
    assert result.before.continuation
    assert result.before.continuation != result.after.continuation


def test_out_is_kept(result: DemoResult) -> None:
    assert result.out is not None
    assert AutoConfig.from_pretrained(result.out).num_key_value_heads == 2


def test_the_better_presets_lose_less_than_the_mean(result: DemoResult) -> None:
    assert list(result.presets) == ["fast", "best"]
    losses = [result.after.held_out_loss, *(preset.held_out_loss for preset in result.presets.values())]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < result.before.held_out_loss + 0.4


def test_uptraining_wins_back_what_converting_lost(result: DemoResult) -> None:
    assert result.recovered is not None
    assert result.uptrained is not None
    assert result.uptrained.steps == 20
    assert result.recovered.held_out_loss < result.presets["best"].held_out_loss - 0.01
    assert result.recovered.kv_cache_bytes_per_token == result.after.kv_cache_bytes_per_token
    assert result.uptrained.folder == Path(f"{result.out}-uptrained")
    assert AutoConfig.from_pretrained(result.uptrained.folder).num_key_value_heads == 2


def test_uptraining_can_be_left_out(tmp_path: Path) -> None:
    result = run_demo(tmp_path / "four", groups=4, uptrain_seconds=0, json=True)
    assert result.recovered is None
    assert not (tmp_path / "four-uptrained").exists()


def test_nothing_is_written_into_the_package() -> None:
    before = {path: path.stat().st_mtime_ns for path in CHECKPOINT.parent.rglob("*") if "__pycache__" not in path.parts}
    result = run_demo(groups=8)
    after = {path: path.stat().st_mtime_ns for path in CHECKPOINT.parent.rglob("*") if "__pycache__" not in path.parts}
    assert before == after
    assert result.out is None
    assert result.loss_rise == pytest.approx(0, abs=1e-6)
    assert result.before.continuation == result.after.continuation


def test_existing_out_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(OutputError):
        run_demo(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
    (tmp_path / "new-uptrained").mkdir()
    with pytest.raises(OutputError):
        run_demo(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_json(result: DemoResult) -> None:
    plain = json.loads(json.dumps(result.to_json()))
    assert plain["out"] == str(result.out)
    assert plain["after"]["held_out_loss"] - plain["before"]["held_out_loss"] == plain["loss_rise"]
