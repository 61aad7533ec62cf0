from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gqa_convert.calibrate.store import LayerStore, identity
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import OutputError
from tests.calibrate.conftest import Saved


def test_a_result_comes_back_whole(work: Path) -> None:
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


def test_other_inputs_do_not_find_it(work: Path) -> None:
    LayerStore(work, "layers", {"groups": 2}).write(0, {"a": torch.ones(1)}, {})
    other = LayerStore(work, "layers", {"groups": 4})
    assert not other.has(0)
    shutil.copy(LayerStore(work, "layers", {"groups": 2}).path(0), other.path(0))
    assert other.read(0) is None


def test_a_damaged_file_counts_as_absent(work: Path) -> None:
    store = LayerStore(work, "layers", {})
    store.write(0, {"a": torch.ones(100)}, {})
    store.path(0).write_bytes(store.path(0).read_bytes()[:-5])
    assert not store.has(0)
    with pytest.raises(OutputError, match="gone or damaged"):
        store.tensor(0, "a")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        LayerStore(tmp_path / "file", "layers", {})


def test_identity_is_of_the_contents(saved: Callable[..., Saved], tmp_path: Path) -> None:
    source = saved("llama").checkpoint
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(source.folder, first)
    shutil.copytree(source.folder, second)
    assert identity(Checkpoint.open(first)) == identity(Checkpoint.open(second)) == identity(source)
    data = bytearray((second / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (second / "model.safetensors").write_bytes(data)
    assert identity(Checkpoint.open(second)) != identity(source)


def test_any_flipped_bit_makes_a_file_absent(work: Path) -> None:
    store = LayerStore(work, "layers", {"groups": 2})
    store.write(0, {"a": torch.arange(12.0).view(3, 4), "b": torch.ones(3, dtype=torch.int32)}, {"error": 0.25})
    path = store.path(0)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    draw = random.Random(0)
    places = [*range(8 * header, 8 * len(whole)), *(draw.randrange(8 * header) for _ in range(400))]
    survived = []
    for place in places:
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        path.write_bytes(data)
        fresh = LayerStore(work, "layers", {"groups": 2})
        read = fresh.read(0)
        assert fresh.has(0) == (read is not None)
        if read is None:
            continue
        # Spaces that pad the header may change to others that mean as little; nothing that is read may.
        survived.append(place)
        assert torch.equal(read[0]["a"], torch.arange(12.0).view(3, 4))
        assert read[1] == {"error": 0.25}
    assert all(place < 8 * header for place in survived)
    path.write_bytes(whole)
    assert store.has(0)


def test_damage_after_the_first_look_is_seen_when_a_tensor_is_read(work: Path) -> None:
    store = LayerStore(work, "layers", {})
    store.write(0, {"a": torch.ones(64)}, {})
    assert store.has(0)
    data = bytearray(store.path(0).read_bytes())
    data[-1] ^= 1
    store.path(0).write_bytes(data)
    with pytest.raises(OutputError, match="gone or damaged"):
        store.tensor(0, "a")
    assert not store.has(0)
