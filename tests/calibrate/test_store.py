from __future__ import annotations

import shutil

import pytest
import torch

from gqa_convert.calibrate.store import LayerStore, identity
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import OutputError


def test_a_result_comes_back_whole(work):
    store = LayerStore(work, "layers", {"groups": 2})
    store.write(3, {"a": torch.arange(6.0).view(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}, {"error": 0.5})
    tensors, report = store.read(3) or ({}, {})
    assert torch.equal(tensors["a"], torch.arange(6.0).view(2, 3).T)
    assert tensors["b"].dtype == torch.bfloat16
    assert report == {"error": 0.5}
    assert store.contents(3) == (("a", "b"), {"error": 0.5})
    assert torch.equal(store.tensor(3, "b"), tensors["b"])
    assert store.path(3).name == "layer-00003.safetensors"
    assert [p.name for p in store.folder.iterdir()] == ["layer-00003.safetensors"]


def test_other_inputs_do_not_find_it(work):
    LayerStore(work, "layers", {"groups": 2}).write(0, {"a": torch.ones(1)}, {})
    other = LayerStore(work, "layers", {"groups": 4})
    assert not other.has(0)
    shutil.copy(LayerStore(work, "layers", {"groups": 2}).path(0), other.path(0))
    assert other.read(0) is None


def test_a_damaged_file_counts_as_absent(work):
    store = LayerStore(work, "layers", {})
    store.write(0, {"a": torch.ones(100)}, {})
    store.path(0).write_bytes(store.path(0).read_bytes()[:-5])
    assert not store.has(0)
    with pytest.raises(OutputError, match="gone or damaged"):
        store.tensor(0, "a")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        LayerStore(tmp_path / "file", "layers", {})


def test_identity_is_of_the_contents(saved, tmp_path):
    source = saved("llama").checkpoint
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(source.folder, first)
    shutil.copytree(source.folder, second)
    assert identity(Checkpoint.open(first)) == identity(Checkpoint.open(second)) == identity(source)
    data = bytearray((second / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (second / "model.safetensors").write_bytes(data)
    assert identity(Checkpoint.open(second)) != identity(source)
