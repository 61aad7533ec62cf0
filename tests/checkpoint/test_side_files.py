from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import CheckpointError

from .helpers import sharded, single

CARRIED = [
    "LICENSE",
    "README.md",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_templates/tool_use.jinja",
    "generation_config.json",
    "merges.txt",
    "modeling_own.py",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "sub/deeper/notes.txt",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
]
LEFT = [
    ".cache/huggingface/download/x",
    ".git/config",
    ".gitattributes",
    "__pycache__/modeling_own.cpython-311.pyc",
    "checkpoint-500/model.safetensors",
    "checkpoint-500/config.json",
    "consolidated.00.pth",
    "consolidated.safetensors",
    "flax_model-00001-of-00002.msgpack",
    "flax_model.msgpack.index.json",
    "model-q4.gguf",
    "model.fp16.safetensors",
    "model.onnx",
    "model.safetensors.index.fp16.json",
    "onnx/config.json",
    "optimizer.pt",
    "original/params.json",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "rng_state.pth",
    "runs/events.out.tfevents.1",
    "rust_model.ot",
    "scheduler.pt",
    "sub/extra.safetensors",
    "tf_model.h5",
    "trainer_state.json",
    "training_args.bin",
]


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name == "generation_config.json" else "x")


@pytest.mark.parametrize("make", [single, sharded])
def test_what_goes_along_and_what_stays(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path)
    fill(tmp_path, CARRIED + LEFT)

    checkpoint = Checkpoint.open(tmp_path)

    assert [str(path) for path in checkpoint.side_files] == sorted(CARRIED)
    left = [str(path) for path in checkpoint.left_files]
    for name in LEFT:
        assert any(name == path or name.startswith(path + "/") for path in left), name


def test_a_link_out_of_the_folder_is_not_carried(tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    (tmp_path / "secret").write_text("key")
    (folder / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: a link that leaves"):
        Checkpoint.open(folder)


def test_a_linked_folder_is_left(tmp_path: Path) -> None:
    folder = single(tmp_path / "m")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "private.txt").touch()
    (folder / "docs").symlink_to("../home")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.side_files == ()
    assert Path("docs") in checkpoint.left_files


@pytest.mark.parametrize("target", ["gone", "merges.txt"])
def test_a_link_to_nothing_is_not_lost_in_silence(tmp_path: Path, target: str) -> None:
    """A damaged cache: without a word the copy would lack its tokenizer."""
    single(tmp_path)
    (tmp_path / "merges.txt").symlink_to(target)
    with pytest.raises(CheckpointError, match=r"merges\.txt: a link to nothing"):
        Checkpoint.open(tmp_path)


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    single(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    assert Checkpoint.open(tmp_path).side_files == ()
