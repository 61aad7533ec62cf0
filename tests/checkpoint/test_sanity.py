"""What wrappers and trainers leave is named for what it is; configurations beyond all reason are refused at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.errors import CheckpointError, UnsupportedModelError

from .helpers import sharded, single, tensors, write_config, write_index

WEIGHTS = "model.safetensors"


def renamed(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + key: value for key, value in tensors().items()}


def with_lora() -> dict[str, torch.Tensor]:
    return {**tensors(), "layers.0.q.lora_A.default.weight": torch.ones(2, 8)}


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (renamed("_orig_mod."), ["'_orig_mod.'", "torch.compile"]),
        (renamed("module."), ["'module.'", "DataParallel"]),
        (renamed("_forward_module."), ["'_forward_module.'"]),
        (renamed("base_model.model."), ["PEFT", "merge_and_unload"]),
        ({"model._orig_mod.a": torch.ones(1), "b": torch.ones(1)}, ["_orig_mod"]),
        (with_lora(), ["LoRA", "layers.0.q.lora_A.default.weight", "merge_and_unload"]),
        ({**tensors(), "embed.weight": torch.empty(0)}, ["'embed.weight'", "empty", "ZeRO-3"]),
    ],
)
def test_what_a_wrapper_or_trainer_left(tmp_path: Path, table: dict[str, torch.Tensor], says: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(single(tmp_path, table))
    assert all(word in str(caught.value) for word in says), str(caught.value)


def test_code_of_its_own_may_name_its_modules_as_it_likes(tmp_path: Path) -> None:
    single(tmp_path, renamed("module."))
    write_config(tmp_path, auto_map={"AutoModelForCausalLM": "own.Own"})
    assert all(key.startswith("module.") for key in Checkpoint.open(tmp_path).tensors)


def leave(*names: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(b"x")

    return make


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda f: (f / WEIGHTS).rename(f / "model.fp16.safetensors"), ["variant 'fp16'", "Rename it to model.safe"]),
        (leave("pytorch_model.fp16.bin"), ["variant 'fp16'", "Rename it to pytorch_model.bin"]),
        (leave("model.safetensors.index.fp16.json"), ["variant 'fp16'", "model.safetensors.index.json"]),
        (
            leave("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "consolidated.safetensors"),
            ["model.safetensors.index.json is missing", "model-00001-of-00002.safetensors"],
        ),
        (leave("pytorch_model-00001-of-00002.bin"), ["pytorch_model.bin.index.json is missing"]),
        (leave("pytorch_model_fsdp_0/__0_0.distcp"), ["pytorch_model_fsdp_0", "distcp", "merge-weights"]),
        (leave("global_step500/mp_rank_00_model_states.pt"), ["global_step500", "zero_to_fp32.py"]),
        (leave("zero_to_fp32.py"), ["DeepSpeed", "zero_to_fp32.py"]),
        (leave("model.gguf"), ["found model.gguf"]),
        (leave(), ["Download the model's weights"]),
    ],
)
def test_what_lies_there_in_place_of_weights(tmp_path: Path, make: Callable[[Path], object], says: list[str]) -> None:
    make(single(tmp_path))
    with pytest.raises(CheckpointError, match="no weights") as caught:
        Checkpoint.open(tmp_path)
    assert all(word in str(caught.value) for word in says), str(caught.value)


def test_an_adapter_file_left_beside_merged_weights(tmp_path: Path) -> None:
    (single(tmp_path) / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match=r"model\.safetensors holds a whole model.*remove adapter_config"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize("value", [2**63, 10**30, 1e30, 10**4000, 5000, [2, 2**63]])
@pytest.mark.parametrize("path", ["num_hidden_layers", "n_layer", "encoder_layers", "text_config.num_hidden_layers"])
def test_layers_without_end(tmp_path: Path, path: str, value: object) -> None:
    single(tmp_path)
    *parents, leaf = path.split(".")
    nested: object = {leaf: value}
    for name in reversed(parents):
        nested = {name: nested}
    assert isinstance(nested, dict)
    write_config(tmp_path, **nested)
    with pytest.raises(CheckpointError, match=leaf) as caught:
        Checkpoint.open(tmp_path)
    assert "11 tensors" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", ["num_attention_heads", "num_key_value_heads", "n_head", "num_local_experts"])
def test_heads_without_end(tmp_path: Path, name: str) -> None:
    write_config(single(tmp_path), **{name: 2**40})
    with pytest.raises(CheckpointError, match=f"{name}.*more than any model has"):
        Checkpoint.open(tmp_path)


def test_ordinary_large_numbers_are_let_through(tmp_path: Path) -> None:
    write_config(
        single(tmp_path),
        rope_theta=1e9,
        max_position_embeddings=10**7,
        vocab_size=10**6,
        num_hidden_layers=800,
        num_attention_heads=512,
        layer_norm_eps=1e-5,
        num_experts=1024,
    )
    Checkpoint.open(tmp_path)


def overlay(folder: Path, name: str, kind: str = "safetensors") -> dict[str, torch.Tensor]:
    """A checkpoint in one shard, one tensor of which an index redirects to another file."""
    table, key = tensors(), "layers.1.v.weight"
    write_config(folder)
    base, stale = f"model-00001-of-00001.{kind}", {**table, key: torch.zeros_like(table[key])}
    save = save_file if kind == "safetensors" else torch.save
    save(stale, folder / base)
    save({key: table[key]}, folder / name)
    write_index(folder, {**dict.fromkeys(table, base), key: name}, INDEXES[kind])
    return table


INDEXES = {"safetensors": "model.safetensors.index.json", "bin": "pytorch_model.bin.index.json"}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_leads_past_a_stale_copy_is_followed(tmp_path: Path, kind: str) -> None:
    table = overlay(tmp_path, f"model-overlay.{kind}", kind)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensors.keys() == table.keys()
    assert all(torch.equal(checkpoint.tensor(key), value) for key, value in table.items())
    assert [len(shard.tensors) for shard in checkpoint.shards] == [len(table) - 1, 1]
    assert "1 stale cop" in checkpoint.notes[0]


def test_where_transformers_would_take_the_stale_copy_it_is_refused(tmp_path: Path) -> None:
    overlay(tmp_path, "abliterated.safetensors")
    with pytest.raises(CheckpointError, match=r"both hold 'layers\.1\.v\.weight'.*remove the other copy"):
        Checkpoint.open(tmp_path)


def test_a_name_tied_to_a_stale_copy_keeps_its_tensor(tmp_path: Path) -> None:
    """lm_head shares the embedding of the base file; the overlay replaces the embedding alone."""
    write_config(tmp_path)
    old, new = torch.randn(4, 4), torch.randn(4, 4)
    torch.save({"embed.weight": old, "lm_head.weight": old, "t": torch.ones(2)}, tmp_path / "a.bin")
    torch.save({"embed.weight": new}, tmp_path / "b.bin")
    where = {"embed.weight": "b.bin", "lm_head.weight": "a.bin", "t": "a.bin"}
    write_index(tmp_path, where, "pytorch_model.bin.index.json")
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.tensor("embed.weight"), new)
    assert torch.equal(checkpoint.tensor("lm_head.weight"), old)
    assert checkpoint.tensors.keys() == where.keys()


def test_shards_that_no_index_can_tell_apart(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    second = folder / "model-00002-of-00002.safetensors"
    save_file({**load_file(second), "extra": torch.ones(1)}, second)
    first = folder / "model-00001-of-00002.safetensors"
    save_file({**load_file(first), "extra": torch.ones(1)}, first)
    assert "extra" not in json.loads((folder / INDEXES["safetensors"]).read_text())["weight_map"]
    with pytest.raises(CheckpointError, match="'extra'"):
        Checkpoint.open(folder)
