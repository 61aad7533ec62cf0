"""Pipes, devices and text without end in a stranger's folder: said in a line, never waited for."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from gqa_convert.checkpoint import files, side_files
from gqa_convert.checkpoint.files import open_inside, parse_object, read_regular
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import CheckpointError

from .helpers import sharded, single

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["config.json", "gqa_convert.json", INDEX, "model.safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device", "socket", "folder"])
def test_what_is_no_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    folder = sharded(tmp_path / "m") if name == INDEX else single(tmp_path / "m")
    file = folder / name
    file.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "socket":
        import socket

        with socket.socket(socket.AF_UNIX) as connection:
            monkeypatch.chdir(folder)  # the address of a socket may only be short
            connection.bind(name)
    else:
        file.mkdir()
    with pytest.raises(CheckpointError, match=name):
        Checkpoint.open(folder)


def test_a_weight_file_that_becomes_a_pipe_after_opening(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="a pipe"):
        checkpoint.tensor("embed.weight")


@pytest.mark.parametrize("name", ["config.json", "gqa_convert.json"])
def test_text_of_any_length_is_not_read(tmp_path: Path, name: str) -> None:
    with open(single(tmp_path) / name, "wb") as file:
        file.truncate(1 << 40)  # a hole, no terabyte of disk
    with pytest.raises(CheckpointError, match="too many"):
        Checkpoint.open(tmp_path)


def test_a_file_that_grows_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    stat = os.fstat

    def smaller(handle: int) -> os.stat_result:
        fields = list(stat(handle))
        fields[6] = 10
        return os.stat_result(fields)

    monkeypatch.setattr(os, "fstat", smaller)
    with pytest.raises(CheckpointError, match="grew"):
        read_regular(tmp_path / "a", 50)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 100_000, "JSON"),
        ('{"a":' * 70 + "1" + "}" * 70, "levels deep"),
        ('{"a": ' + "9" * 5000 + "}", "JSON"),
        ("", "JSON"),
        ("[]", "list"),
        ("null", "NoneType"),
    ],
)
def test_what_is_no_object(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says) as caught:
        parse_object(tmp_path / "x.json", text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_link_made_at_the_last_moment_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is looked at, then swapped for a link to a secret, then opened, then swapped back."""
    folder = single(tmp_path / "m")
    (tmp_path / "secret").write_text("key")
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = Checkpoint.open(folder)
    regular = files.open_regular

    def swapped(path: Path) -> BinaryIO:
        path.rename(tmp_path / "kept")
        path.symlink_to("../secret")
        opened = regular(path)
        path.unlink()
        (tmp_path / "kept").rename(path)
        return opened

    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="leaves the model folder"):
        side_files.copy_side_file(folder, checkpoint.side_files[0], tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    monkeypatch.setattr(files, "open_regular", swapped)
    with pytest.raises(CheckpointError, match="leaves the model folder"):
        open_inside(folder, folder / "tokenizer.json")
    assert not (tmp_path / "tokenizer.json").exists()


def test_a_side_file_is_copied_whole(tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    (folder / "sub").mkdir()
    (folder / "sub" / "a.txt").write_bytes(bytes(range(256)) * 5000)
    side_files.copy_side_file(folder, Path("sub/a.txt"), tmp_path / "copy")
    assert (tmp_path / "copy" / "sub" / "a.txt").read_bytes() == bytes(range(256)) * 5000
    assert sys.platform != "linux" or not (tmp_path / "copy" / "sub" / "a.txt").is_symlink()
