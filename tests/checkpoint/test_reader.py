from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import CheckpointError, UnsupportedModelError

from .helpers import raw_safetensors, sharded, single, tensors, write_config, write_index


def test_a_single_file_is_seen_whole(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path))

    assert (checkpoint.format, checkpoint.is_sharded) == ("safetensors", False)
    assert [shard.name for shard in checkpoint.shards] == ["model.safetensors"]
    assert checkpoint.shards[0].metadata == {"format": "pt"}
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.total_bytes == sum(t.numel() * 2 for t in tensors().values())
    assert checkpoint.weight_files == (tmp_path / "model.safetensors",)
    for key, value in tensors().items():
        assert torch.equal(checkpoint.tensor(key), value)


def test_shards_keep_their_names_and_hold_everything_between_them(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path, 3))

    assert checkpoint.is_sharded
    assert [shard.name for shard in checkpoint.shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [shard.metadata["part"] for shard in checkpoint.shards] == ["0", "1", "2"]
    assert checkpoint.tensors.keys() == tensors().keys()
    assert torch.equal(checkpoint.tensor("layers.1.k.weight"), tensors()["layers.1.k.weight"])


def test_a_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path))
    tensor = checkpoint.tensor("layers.0.k.weight")
    before = (tmp_path / "model.safetensors").read_bytes()

    tensor.fill_(3)

    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not torch.equal(checkpoint.tensor("layers.0.k.weight"), tensor)
    (tmp_path / "model.safetensors").unlink()
    assert tensor.sum() == 3 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool])
def test_every_dtype_is_read_as_stored(tmp_path: Path, dtype: torch.dtype) -> None:
    table = {"x": torch.arange(6).reshape(2, 3).to(dtype), "empty": torch.empty(0, 2, dtype=dtype)}
    checkpoint = Checkpoint.open(single(tmp_path, table))

    for key, value in table.items():
        stored = checkpoint.tensor(key)
        assert (stored.dtype, stored.shape) == (dtype, value.shape)
        assert torch.equal(stored.double(), value.double())


def test_opening_a_safetensors_checkpoint_needs_no_torch(tmp_path: Path) -> None:
    single(tmp_path)
    code = (
        "import sys; from pathlib import Path; import gqa_convert.checkpoint as c; "
        "import gqa_convert.checkpoint.hub, gqa_convert.checkpoint.provenance; "
        "c.Checkpoint.open(Path(sys.argv[1])); "
        "sys.exit(not {'torch', 'transformers', 'huggingface_hub'}.isdisjoint(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0


def test_config_text_is_kept_to_the_byte(tmp_path: Path) -> None:
    single(tmp_path)
    raw = b'\xef\xbb\xbf{\r\n "model_type": "llama", "eps": 1E-5,\r\n "name": "\xc3\xa9" }'
    (tmp_path / "config.json").write_bytes(raw)

    checkpoint = Checkpoint.open(tmp_path)

    assert checkpoint.config_text.encode() == raw
    assert checkpoint.config["eps"] == 1e-5


def test_provenance_of_an_earlier_conversion_is_exposed_and_not_carried_along(tmp_path: Path) -> None:
    single(tmp_path)
    assert Checkpoint.open(tmp_path).provenance is None
    (tmp_path / "gqa_convert.json").write_text('{"method": "mean"}')

    checkpoint = Checkpoint.open(tmp_path)

    assert checkpoint.provenance == {"method": "mean"}
    assert Path("gqa_convert.json") not in checkpoint.side_files + checkpoint.left_files


def refuse(folder: Path, *says: str, kind: type[Exception] = CheckpointError) -> None:
    with pytest.raises(kind) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert all(text in message for text in says), message
    assert "\n" not in message


def test_missing_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "gone", "gone: does not exist")


def test_a_file_in_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    refuse(tmp_path / "model.safetensors", "is a file")


def test_no_config(tmp_path: Path) -> None:
    single(tmp_path)
    (tmp_path / "config.json").unlink()
    refuse(tmp_path, "no config.json")


@pytest.mark.parametrize("config", [True, False])
def test_an_adapter(tmp_path: Path, config: bool) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    if config:
        single(tmp_path)
    refuse(tmp_path, "PEFT adapter", "Merge it", kind=UnsupportedModelError)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"{", "not valid JSON"), (b"", "not valid JSON"), (b"[1]", "list"), (b"\xff\xfe{", "not UTF-8")],
)
def test_a_broken_config(tmp_path: Path, content: bytes, says: str) -> None:
    single(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    refuse(tmp_path, "config.json", says)


def test_no_weights_says_what_is_there_instead(tmp_path: Path) -> None:
    write_config(tmp_path)
    refuse(tmp_path, "no weights")
    (tmp_path / "model.q4.gguf").touch()
    (tmp_path / "consolidated.00.pth").touch()
    refuse(tmp_path, "no weights", "model.q4.gguf", "consolidated.00.pth")


def test_a_truncated_shard(tmp_path: Path) -> None:
    sharded(tmp_path)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    refuse(tmp_path, "model-00002-of-00002.safetensors", "truncated", "download it again")


def test_an_index_naming_a_missing_file(tmp_path: Path) -> None:
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refuse(tmp_path, "model.safetensors.index.json", "model-00002-of-00002.safetensors", "no such file")


def test_an_index_naming_a_key_that_is_not_there(tmp_path: Path) -> None:
    sharded(tmp_path)
    name = "model-00001-of-00002.safetensors"
    write_index(tmp_path, {"embed.weight": name, "lm_head.weight": name})
    refuse(tmp_path, name, "'lm_head.weight'")


def test_two_shards_holding_one_key(tmp_path: Path) -> None:
    """transformers keeps the copy of the last file; where the index means another, nobody knows which is right."""
    sharded(tmp_path)
    save_file(tensors(), tmp_path / "model-00002-of-00002.safetensors")
    refuse(tmp_path, "both hold", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def test_a_file_without_tensors(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(raw_safetensors({}))
    refuse(tmp_path, "no tensors")


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'x\.weight'"):
        Checkpoint.open(single(tmp_path)).tensor("x.weight")


def test_a_file_that_shrinks_after_opening_is_noticed(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path))
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match="early"):
        checkpoint.tensor(list(checkpoint.tensors)[-1])


def test_a_provenance_file_that_is_no_json(tmp_path: Path) -> None:
    single(tmp_path)
    (tmp_path / "gqa_convert.json").write_text("{")
    refuse(tmp_path, "gqa_convert.json", "not valid JSON")


def test_reading_changes_nothing(tmp_path: Path) -> None:
    sharded(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    checkpoint = Checkpoint.open(tmp_path / "a")
    for key in checkpoint.tensors:
        checkpoint.tensor(key)
    for file in (tmp_path / "b").iterdir():
        assert (tmp_path / "a" / file.name).read_bytes() == file.read_bytes()


def test_a_format_that_the_installed_library_cannot_read(tmp_path: Path) -> None:
    """A copy of it would not load."""
    write_config(tmp_path)
    header = {"a": {"dtype": "V32", "shape": [2], "data_offsets": [0, 8]}}
    (tmp_path / "model.safetensors").write_bytes(raw_safetensors(header, bytes(8)))
    refuse(tmp_path, "'V32'", "safetensors")


@pytest.mark.parametrize("text", ["", "true", "[]", "{"])
def test_a_generation_config_that_is_none(tmp_path: Path, text: str) -> None:
    (single(tmp_path) / "generation_config.json").write_text(text)
    refuse(tmp_path, "generation_config.json")
