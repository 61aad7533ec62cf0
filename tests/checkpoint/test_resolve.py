"""Which files hold the weights, and which paths are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gqa_convert.checkpoint.provenance import source_identity
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.checkpoint.resolve import resolve_weights
from gqa_convert.errors import CheckpointError

from .helpers import sharded, single, tensors, write_config, write_index


def test_a_whole_file_beside_an_index_wins(tmp_path: Path) -> None:
    sharded(tmp_path)
    single(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert [shard.file.name for shard in checkpoint.shards] == ["model.safetensors"]
    assert Path("model-00001-of-00002.safetensors") in checkpoint.left_files


def test_the_config_may_name_the_file(tmp_path: Path) -> None:
    single(tmp_path)
    single(tmp_path, {"other.weight": tensors()["embed.weight"]}, name="other.safetensors")
    write_config(tmp_path, transformers_weights="other.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint.tensors) == ["other.weight"]
    assert checkpoint.shards[0].name == "model.safetensors"  # the copy needs no transformers_weights


def test_the_config_may_name_the_index(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "mine.safetensors.index.json")
    write_config(tmp_path, transformers_weights="mine.safetensors.index.json")
    assert len(Checkpoint.open(tmp_path).shards) == 2


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../x.safetensors", "outside"),
        ("/etc/x.safetensors", "outside"),
        ("a/../../x.safetensors", "outside"),
        ("gone.safetensors", "no such file"),
        ("model.bin", "must name"),
        (7, "must name"),
    ],
)
def test_the_config_may_not_name_just_anything(tmp_path: Path, name: object, says: str) -> None:
    folder = single(tmp_path / "m")
    single(tmp_path, name="x.safetensors")
    write_config(folder, transformers_weights=name)
    with pytest.raises(CheckpointError, match=says) as caught:
        Checkpoint.open(folder)
    assert "transformers_weights" in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "{abs}", "sub/in.safetensors", "..", "", ".", "a\\b.safetensors", "a\0.safetensors"]
)
def test_an_index_entry_must_be_a_plain_name(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "m"
    write_config(folder)
    single(tmp_path, name="out.safetensors")
    (folder / "sub").mkdir()
    single(folder / "sub", name="in.safetensors")
    write_index(folder, {"embed.weight": name.format(abs=tmp_path / "out.safetensors")})
    with pytest.raises(CheckpointError, match="not a plain file name"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', '{"a": "\\ud8'],
)
def test_a_broken_index(tmp_path: Path, content: str) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        Checkpoint.open(tmp_path)


def test_an_index_entry_of_another_kind(tmp_path: Path) -> None:
    single(tmp_path, name="weights.dat")
    write_index(tmp_path, {"embed.weight": "weights.dat"})
    with pytest.raises(CheckpointError, match=r"not a \.safetensors file"):
        Checkpoint.open(tmp_path)


def test_an_index_entry_may_not_be_a_link_out_of_the_folder(tmp_path: Path) -> None:
    single(tmp_path / "elsewhere", name="x.safetensors")
    folder = tmp_path / "m"
    write_config(folder)
    (folder / "x.safetensors").symlink_to("../elsewhere/x.safetensors")
    write_index(folder, {"embed.weight": "x.safetensors"})
    with pytest.raises(CheckpointError, match="outside the model folder"):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "loop.safetensors", "half\ud800.safetensors"])
def test_an_index_entry_that_can_be_no_file(tmp_path: Path, name: str) -> None:
    write_config(tmp_path)
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    write_index(tmp_path, {"embed.weight": name})
    with pytest.raises(CheckpointError, match=r"index\.json: names"):
        Checkpoint.open(tmp_path)


def test_an_index_entry_may_be_a_link_within_the_folder(tmp_path: Path) -> None:
    single(tmp_path, name="real.safetensors")
    (tmp_path / "x.safetensors").symlink_to("real.safetensors")
    write_index(tmp_path, dict.fromkeys(tensors(), "x.safetensors"))
    assert Checkpoint.open(tmp_path).tensors.keys() == tensors().keys()


def test_the_folders_own_weight_file_may_be_a_link(tmp_path: Path) -> None:
    """The name is fixed and the folder is the user's choice: a link farm to a big disk is common."""
    single(tmp_path / "disk")
    folder = tmp_path / "m"
    write_config(folder)
    (folder / "model.safetensors").symlink_to(tmp_path / "disk" / "model.safetensors")
    assert Checkpoint.open(folder).tensors.keys() == tensors().keys()


def hub_cache(root: Path) -> Path:
    """A sharded checkpoint laid out as the hub cache does: every file of a snapshot is a link to a blob."""
    repo = root / "models--org--name"
    plain = sharded(root / "plain")
    (plain / "tokenizer.json").write_text("{}")
    snapshot = repo / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(sorted(plain.iterdir())):
        file.rename(repo / "blobs" / f"{number:040d}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040d}")
    return snapshot


def test_a_hub_cache_works_through_its_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_cache(tmp_path / "cache")
    (tmp_path / "short").symlink_to(snapshot)
    monkeypatch.chdir(tmp_path)
    for folder in (snapshot, tmp_path / "short", Path("short"), Path("cache/models--org--name/snapshots/abc123")):
        checkpoint = Checkpoint.open(folder)
        assert checkpoint.tensors.keys() == tensors().keys()
        assert checkpoint.side_files == (Path("tokenizer.json"),)
        assert checkpoint.tensor("embed.weight").shape == (11, 8)
        assert source_identity(checkpoint)["hub"] == {"repo_id": "org/name", "revision": "abc123"}


def test_a_hub_cache_may_not_reach_into_another_model(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    secret = single(tmp_path / "models--other--secret" / "blobs", name="x")
    shard = snapshot / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(secret / "x")
    with pytest.raises(CheckpointError, match="outside the model folder"):
        Checkpoint.open(snapshot)


def test_a_subfolder_of_a_hub_snapshot_is_still_in_the_cache(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    blob = os.readlink(snapshot / "tokenizer.json")
    inner = snapshot / "text_encoder"
    single(inner)
    (inner / "vocab.json").symlink_to(f"../{blob}")
    assert Checkpoint.open(inner).side_files == (Path("vocab.json"),)


def test_the_order_is_that_of_transformers(tmp_path: Path) -> None:
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
    for present in range(1, 16):
        folder = tmp_path / str(present)
        write_config(folder)
        single(folder, name="a.safetensors")
        (folder / "a.bin").touch()
        for bit, name in enumerate(names):
            if not present >> bit & 1:
                continue
            if name.endswith(".json"):
                write_index(folder, {"embed.weight": "a.safetensors" if "safe" in name else "a.bin"}, name)
            else:
                (folder / name).touch()
        theirs, _ = _get_resolved_checkpoint_files(str(folder), None, None, None, None, False)
        ours = resolve_weights(folder, {})
        assert [str(file) for file in ours.files] == theirs
