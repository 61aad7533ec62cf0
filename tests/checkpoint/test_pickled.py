from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.checkpoint.writer import TargetTensor, write_shard
from gqa_convert.errors import CheckpointError

from .helpers import tensors, write_config, write_index

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def pickled(folder: Path, table: Any, *, zipped: bool = True, name: str = "pytorch_model.bin") -> Path:
    write_config(folder)
    torch.save(table, folder / name, _use_new_zipfile_serialization=zipped)
    return folder


@FORMATS
def test_all_kinds_of_tensors_are_read_and_copied(tmp_path: Path, zipped: bool) -> None:
    base = torch.randn(6, 8)
    table = OrderedDict(
        plain=base,
        strided=torch.randn(5, 4).t(),
        part=torch.arange(100)[10:17],
        stepped=torch.arange(100)[3:60:7],
        expanded=torch.ones(1, 3).expand(4, 3),
        parameter=torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        scalar=torch.tensor(1.5, dtype=torch.float16),
        empty=torch.empty(0, 2),
        flags=torch.tensor([True, False]),
    )
    checkpoint = Checkpoint.open(pickled(tmp_path, table, zipped=zipped))

    assert (checkpoint.format, checkpoint.shards[0].name) == ("bin", "model.safetensors")
    assert list(checkpoint.tensors) == list(table)
    out = tmp_path / "out.safetensors"
    write_shard(out, [TargetTensor.copy_of(info) for info in checkpoint.tensors.values()], {})
    written = load_file(out)
    for key, value in table.items():
        assert torch.equal(checkpoint.tensor(key), value)
        assert torch.equal(written[key], value)
        assert written[key].dtype == value.dtype


@FORMATS
def test_of_tied_weights_the_first_name_is_kept(tmp_path: Path, zipped: bool) -> None:
    embedding = torch.randn(4, 4)
    table = {"embed.weight": embedding, "head.bias": torch.zeros(4), "lm_head.weight": embedding, "t": embedding.t()}
    checkpoint = Checkpoint.open(pickled(tmp_path, table, zipped=zipped))
    assert list(checkpoint.tensors) == ["embed.weight", "head.bias", "t"]
    assert checkpoint.shards[0].aliases == {"lm_head.weight": "embed.weight"}


def test_two_halves_of_one_storage_are_two_tensors(tmp_path: Path) -> None:
    both = torch.arange(8.0)
    checkpoint = Checkpoint.open(pickled(tmp_path, {"a": both[:4], "b": both[4:]}))
    assert checkpoint.tensor("b").tolist() == [4, 5, 6, 7]


def test_sharded_pickles_become_safetensors_shards(tmp_path: Path) -> None:
    table = tensors()
    halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": dict(list(table.items())[i::2]) for i in (0, 1)}
    for name, half in halves.items():
        pickled(tmp_path, half, name=name)
    weight_map = {key: name for name, half in halves.items() for key in half}
    write_index(tmp_path, weight_map, "pytorch_model.bin.index.json")

    checkpoint = Checkpoint.open(tmp_path)

    assert [shard.name for shard in checkpoint.shards] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert checkpoint.is_sharded
    assert all(torch.equal(checkpoint.tensor(key), value) for key, value in table.items())


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle"])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    trap = tmp_path / "executed"
    table = {"a": torch.ones(2), "b": Evil(trap)}
    folder = pickled(tmp_path / "m", table, zipped=how == "zip")
    if how == "plain pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(trap)))

    with pytest.raises(CheckpointError, match="refused and nothing in it was executed") as caught:
        Checkpoint.open(folder)

    assert not trap.exists()
    assert "\n" not in str(caught.value)
    assert "pytorch_model.bin" in str(caught.value)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([torch.ones(1)], "list"),
        ({"a": torch.ones(1), "step": 3}, "'step' is a int"),
        ({1: torch.ones(1)}, "not a tensor"),
        ({"state_dict": {"a": torch.ones(1)}}, "'state_dict' is a dict"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
    ],
)
@FORMATS
def test_what_is_no_table_of_tensors(tmp_path: Path, table: Any, says: str, zipped: bool) -> None:
    with pytest.raises(CheckpointError, match=says):
        Checkpoint.open(pickled(tmp_path, table, zipped=zipped))


@FORMATS
@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_pickle(tmp_path: Path, zipped: bool, keep: float) -> None:
    folder = pickled(tmp_path, {"a": torch.ones(1000)}, zipped=zipped)
    raw = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(raw[: int(keep * len(raw)) if keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        Checkpoint.open(folder)


@FORMATS
@pytest.mark.parametrize(
    "table",
    [
        {"a": torch.zeros(1).expand(1 << 22)},
        {"a": torch.zeros(64).as_strided((1 << 14, 64), (0, 1))},
        {f"a{n}": value for n, value in enumerate(torch.zeros(1 << 18).as_strided((30, 1 << 16), (1, 1)))},
    ],
    ids=["one value", "rows", "many views"],
)
def test_views_that_repeat_their_bytes_without_bound(tmp_path: Path, table: Any, zipped: bool) -> None:
    """A few kilobytes would become gigabytes of output."""
    with pytest.raises(CheckpointError, match="repeat their bytes"):
        Checkpoint.open(pickled(tmp_path, table, zipped=zipped))


@FORMATS
def test_the_empty_state_of_a_layer_is_passed_over(tmp_path: Path, zipped: bool) -> None:
    """TransformerEngine leaves None under that name; transformers loads such files."""
    table = {"a": torch.ones(2), "layers.0.attention._extra_state": None}
    assert list(Checkpoint.open(pickled(tmp_path / "m", table, zipped=zipped)).tensors) == ["a"]
    with pytest.raises(CheckpointError, match="'b' is a NoneType"):
        Checkpoint.open(pickled(tmp_path / "n", {"a": torch.ones(2), "b": None}, zipped=zipped))


@FORMATS
def test_a_key_that_is_no_text(tmp_path: Path, zipped: bool) -> None:
    try:
        folder = pickled(tmp_path, {"\ud800": torch.ones(2)}, zipped=zipped)
    except UnicodeEncodeError:
        pytest.skip("pickle refuses to write it")
    with pytest.raises(CheckpointError, match="no text"):
        Checkpoint.open(folder)


def test_compressed_archives_are_refused(tmp_path: Path) -> None:
    folder = pickled(tmp_path, {"a": torch.ones(1000)})
    file = folder / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="compressed"):
        Checkpoint.open(folder)


def test_big_endian_archives_are_refused(tmp_path: Path) -> None:
    folder = pickled(tmp_path, {"a": torch.ones(4)})
    file = folder / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, b"big" if name.endswith("byteorder") else content)
    with pytest.raises(CheckpointError, match="big-endian"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"K\x04tq\x07Q", b"K\x64tq\x07Q"),  # 100 elements in a storage of 4
        (b"K\x02K\x02\x85", b"K\x03K\x02\x85"),  # two elements from the fourth on
        (b"K\x01\x85q\x09", b"K\x09\x85q\x09"),  # a stride of 9
    ],
)
def test_a_pickle_that_lies_about_its_storage_is_refused(tmp_path: Path, before: bytes, after: bytes) -> None:
    """Bytes that belong to something else must not be read in a tensor's name."""
    folder = pickled(tmp_path, {"a": torch.arange(4.0)[2:4]})
    file = folder / "pytorch_model.bin"
    raw = file.read_bytes()
    assert raw.count(before) == 1
    file.write_bytes(raw.replace(before, after))
    with pytest.raises(CheckpointError, match="not where its pickle says"):
        Checkpoint.open(folder)


def test_the_names_kept_of_tied_weights_are_those_transformers_keeps(tmp_path: Path) -> None:
    from transformers import (
        BartConfig,
        BartForConditionalGeneration,
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5ForConditionalGeneration,
    )

    small: dict[str, Any] = {"vocab_size": 16, "d_model": 8, "num_layers": 1}
    models = [
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=16,
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                tie_word_embeddings=True,
            )
        ),
        GPT2LMHeadModel(GPT2Config(vocab_size=16, n_embd=8, n_layer=1, n_head=2)),
        T5ForConditionalGeneration(T5Config(**small, d_kv=4, d_ff=8, num_heads=2)),
        BartForConditionalGeneration(
            BartConfig(
                **small, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2
            )
        ),
    ]
    for model in models:
        name = type(model).__name__
        model.save_pretrained(tmp_path / name / "safe")
        pickled(tmp_path / name / "bin", model.state_dict())
        ours = Checkpoint.open(tmp_path / name / "bin")
        assert ours.shards[0].aliases, name
        assert set(ours.tensors) == set(Checkpoint.open(tmp_path / name / "safe").tensors), name
