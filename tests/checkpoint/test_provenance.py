from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from gqa_convert.checkpoint.provenance import PROVENANCE, source_identity, write_provenance
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import CheckpointError

from .helpers import sharded, single, write_config


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_folder_is_recognised_by_its_headers_and_on_request_by_every_byte(tmp_path: Path) -> None:
    folder = sharded(tmp_path / "model")
    checkpoint = Checkpoint.open(folder)

    quick, full = source_identity(checkpoint), source_identity(checkpoint, hash_files=True)

    assert quick["name"] == "model"
    assert quick["config_sha256"] == sha256((folder / "config.json").read_bytes())
    assert [file["name"] for file in quick["files"]] == [file.name for file in checkpoint.weight_files]
    for file, more in zip(quick["files"], full["files"], strict=True):
        raw = (folder / file["name"]).read_bytes()
        assert file["bytes"] == len(raw)
        assert file["header_sha256"] == sha256(raw[: 8 + int.from_bytes(raw[:8], "little")])
        assert more == file | {"sha256": sha256(raw)}
    assert "hub" not in quick
    assert str(tmp_path) not in json.dumps(full)


def test_a_hub_snapshot_is_named_by_repository_revision_and_blobs(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = single(repo / "snapshots" / "abc")
    (repo / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(repo / "blobs" / "f00d")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")

    identity = source_identity(Checkpoint.open(snapshot))

    assert identity["name"] == "org/name"
    assert identity["hub"] == {"repo_id": "org/name", "revision": "abc"}
    assert identity["files"][0]["blob"] == "f00d"


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_weights_have_an_identity_too(tmp_path: Path, zipped: bool) -> None:
    digests = []
    for folder, value in ((tmp_path / "a", 1.0), (tmp_path / "b", 1.0), (tmp_path / "c", 2.0)):
        write_config(folder)
        table = {"x": torch.full((4,), value)}
        torch.save(table, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        digests.append(source_identity(Checkpoint.open(folder))["files"][0]["header_sha256"])
    assert digests[0] != digests[2]
    if zipped:
        assert digests[0] == digests[1]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = single(tmp_path)
    data = {"method": "mean", "name": "Ångström", "groups": 4}
    write_provenance(folder / PROVENANCE, data)
    record = Checkpoint.open(folder).provenance
    assert record is not None
    assert record.items() >= data.items()
    assert record["tool"]["name"] == "gqa-convert"
    listed = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    assert record["files"] == {name: {"bytes": len(raw), "sha256": sha256(raw)} for name, raw in listed.items()}
    assert (folder / PROVENANCE).read_text("utf-8").endswith("}\n")


def test_a_source_that_is_gone(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="can no longer be read"):
        source_identity(checkpoint)


def test_a_record_that_is_a_link_to_something_else_is_not_read(tmp_path: Path) -> None:
    """Its contents would be copied into the output of uptraining."""
    folder = single(tmp_path / "m")
    (tmp_path / "credentials.json").write_text('{"token": "secret"}')
    (folder / PROVENANCE).symlink_to("../credentials.json")
    with pytest.raises(CheckpointError, match=r"gqa_convert\.json: a link that leaves") as caught:
        Checkpoint.open(folder)
    assert "secret" not in str(caught.value)


def test_names_that_are_no_text_survive_in_the_record(tmp_path: Path) -> None:
    folder = single(tmp_path / os.fsdecode(b"m\xff"))
    (folder / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    write_provenance(folder / PROVENANCE, {"source": source_identity(Checkpoint.open(folder))})
    record = Checkpoint.open(folder).provenance
    assert record is not None
    assert os.fsdecode(b"caf\xe9.txt") in record["files"]
