"""A teacher's likeliest tokens on disk: the same training, resumed caching, and caches that do not fit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_convert.errors import CheckpointError, Preempted, UsageError
from gqa_convert.uptrain import teacher_cache
from gqa_convert.uptrain.read_config import parse_config
from gqa_convert.uptrain.teacher_cache import cache_teacher
from tests.support import Command
from tests.uptrain.conftest import WORDS
from tests.uptrain.test_run import losses, run, trained

EVERY = len(WORDS) + 3
"""The whole vocabulary: nothing is left out."""


@pytest.fixture
def distilled(settings: dict[str, Any], teacher_folder: Path) -> dict[str, Any]:
    settings["objective"] = {"distillation": {"teacher": str(teacher_folder), "dtype": "float32"}}
    return settings


def with_cache(settings: dict[str, Any], folder: Path, output: Path) -> dict[str, Any]:
    told = {**settings["objective"]["distillation"], "cache": str(folder), "teacher": "not/here"}
    return {**settings, "objective": {"distillation": told}, "output": str(output)}


def test_training_from_the_cache_is_training_from_the_teacher(distilled: dict[str, Any], tmp_path: Path) -> None:
    direct = run(distilled)
    blocks, _ = cache_teacher(parse_config(distilled), tmp_path / "cache", top_k=EVERY)
    assert blocks == 80
    cached = run(with_cache(distilled, tmp_path / "cache", tmp_path / "cached"))
    assert cached.reference_loss == pytest.approx(direct.reference_loss, abs=1e-6)
    assert cached.loss_after == pytest.approx(direct.loss_after, abs=5e-3)  # logits are kept in 16 bits
    one, two = losses(distilled["output"]), losses(tmp_path / "cached")
    assert all(one[step][0] == pytest.approx(two[step][0], rel=0.02, abs=2e-3) for step in one)
    assert not torch.equal(trained(distilled["output"])["lm_head.weight"], torch.zeros(1))


def test_a_stopped_cache_goes_on_with_what_is_missing(
    distilled: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_cache, "_BLOCKS", 16)
    config, out = parse_config(distilled), tmp_path / "cache"
    done: list[int] = []
    with pytest.raises(Preempted):
        cache_teacher(config, out, top_k=4, stopped=lambda: len(done) >= 2, advance=done.append)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("blocks-*")}
    assert len(kept) == 2
    with pytest.raises(CheckpointError, match="holds no teacher's cache"):
        run(with_cache(distilled, out, tmp_path / "early"))
    cache_teacher(config, out, top_k=4)
    assert len(list(out.glob("blocks-*"))) == 5
    assert all((out / name).stat().st_mtime_ns == time for name, time in kept.items())
    run(with_cache(distilled, out, tmp_path / "cached"))
    (out / "blocks-000003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"blocks-000003\.safetensors: is missing"):
        run(with_cache(distilled, out, tmp_path / "missing"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"train": {"seed": 5}}, "was made with other seed"),
        ({"budget": {"steps": 40}}, "has 80 blocks, the run needs 160"),
        ({"data": {"context": 16}}, "was made with other"),
    ],
)
def test_a_cache_of_other_text_is_refused(
    distilled: dict[str, Any], tmp_path: Path, change: dict[str, Any], problem: str
) -> None:
    cache_teacher(parse_config(distilled), tmp_path / "cache", top_k=2)
    run_settings = with_cache(distilled, tmp_path / "cache", tmp_path / "cached")
    with pytest.raises(UsageError, match=problem):
        run(run_settings, **change)


def test_what_cannot_be_cached_is_said(
    distilled: dict[str, Any],
    settings: dict[str, Any],
    tmp_path: Path,
    command: Command,
    write_config: Callable[..., Path],
) -> None:
    distilled["objective"]["distillation"]["hidden_weight"] = 1.0
    with pytest.raises(UsageError, match="hidden states are not kept"):
        cache_teacher(parse_config(distilled), tmp_path / "cache")
    distilled["objective"]["distillation"]["hidden_weight"] = 0.0
    path = write_config(distilled)
    done = command("gqa", "uptrain", "cache-teacher", path, "--out", tmp_path / "cache", "--top-k", 3, "--json")
    assert json.loads(done.out)["blocks"] == 80
    assert Path(tmp_path / "cache" / "cache.json").stat().st_mode & 0o044
