from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from gqa_convert.checkpoint.fingerprint import sampled_digest
from gqa_convert.checkpoint.reader import Checkpoint


def folder(path: Path, weight: torch.Tensor) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    save_file({"weight": weight}, path / "model.safetensors")
    return path


@settings(max_examples=30, deadline=None)
@given(at=st.integers(0, 99_999))
def test_any_byte_of_a_small_file_counts(tmp_path_factory: pytest.TempPathFactory, at: int) -> None:
    path = tmp_path_factory.mktemp("model")
    weight = torch.zeros(100_000, dtype=torch.uint8)
    before = sampled_digest(Checkpoint.open(folder(path, weight)))
    assert sampled_digest(Checkpoint.open(folder(path, weight.clone()))) == before
    weight[at] = 1
    assert sampled_digest(Checkpoint.open(folder(path, weight))) != before


def test_a_percent_of_a_large_file_counts(tmp_path: Path) -> None:
    weight = torch.zeros(64 << 20, dtype=torch.uint8)
    before = sampled_digest(Checkpoint.open(folder(tmp_path / "model", weight)))
    start = 40 << 20
    weight[start : start + len(weight) // 100] = 1
    assert sampled_digest(Checkpoint.open(folder(tmp_path / "model", weight))) != before
