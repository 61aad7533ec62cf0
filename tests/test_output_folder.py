"""What a conversion leaves on the disk: shards, index, side files, provenance; and what it leaves alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_convert import convert
from tests import factories
from tests.support import tree

INDEX = "model.safetensors.index.json"


def test_shards_keep_their_names_and_the_index_tells_the_truth(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", shard_size="60KB")
    out = convert(source, groups=2).out
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (source, out))
    assert after["weight_map"] == before["weight_map"]
    tensors = factories.tensors_of(out)
    assert after["metadata"] == {
        "total_size": sum(x.nbytes for x in tensors.values()),
        "total_parameters": sum(x.numel() for x in tensors.values()),
    }
    assert after["metadata"]["total_size"] < before["metadata"]["total_size"]
    factories.load(out)


def test_dropped_tensors_leave_the_index_too(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "stablelm", shard_size="60KB")
    result = convert(source, groups=2)
    index = json.loads((result.out / INDEX).read_text())
    assert index["weight_map"].keys() == factories.tensors_of(result.out).keys()
    assert result.plan.dropped_tensors == 2 * 6
    factories.load(result.out, "stablelm")


def test_side_files_go_along_and_strangers_do_not(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    taken = {"chat_template.jinja": "x", "special_tokens_map.json": "{}", "LICENSE": "y", "sub/notes.txt": "z"}
    left = {"pytorch_model.bin": "a", "model.gguf": "b", "optimizer.pt": "c", ".cache/d": "d", "onnx/model.onnx": "e"}
    for name, text in {**taken, **left}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    out = convert(source, groups=4).out
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    own = {"config.json", "generation_config.json", "gqa_convert.json", "model.safetensors", "tokenizer.json"}
    own |= {"README.md"}
    assert files == own | taken.keys()
    assert all((out / name).read_text() == text for name, text in taken.items())


def test_the_source_is_not_touched(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", shard_size="60KB")
    before, times = tree(source), os.stat(source).st_mtime_ns
    convert(source, groups=2, verify="logits")
    assert tree(source) == before
    assert os.stat(source).st_mtime_ns == times


def test_a_source_that_cannot_be_written_to_is_enough(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    for path in (*source.iterdir(), source):
        path.chmod(0o555 if path.is_dir() else 0o444)
    out = convert(source, groups=2).out
    assert all(os.access(file, os.W_OK) for file in out.iterdir())
    source.chmod(0o755)


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "olmo2", shard_size="60KB", dtype=torch.bfloat16)
    folders = [convert(source, groups=4, method=method, out=tmp_path / name).out for method, name in RUNS]
    for one, two in (folders[:2], folders[2:]):
        assert {name: digest for name, (digest, _) in tree(one).items()} == {
            name: digest for name, (digest, _) in tree(two).items()
        }


def test_without_a_flush_the_bytes_are_the_same(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "llama", shard_size="60KB")
    flushed = convert(source, groups=2, out=tmp_path / "a").out
    quick = convert(source, groups=2, out=tmp_path / "b", flush=False).out
    assert tree(flushed).keys() == tree(quick).keys()
    assert {name: digest for name, (digest, _) in tree(flushed).items()} == {
        name: digest for name, (digest, _) in tree(quick).items()
    }


RUNS = [("mean", "a"), ("mean", "b"), ("random", "c"), ("random", "d")]


def test_provenance_says_where_a_folder_came_from(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "my-model")
    out = convert(source, groups=4, method="random", seed=3).out
    text = (out / "gqa_convert.json").read_text()
    record = json.loads(text)
    file = source / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    assert record["source"]["name"] == "my-model"
    assert record["source"]["files"] == [
        {
            "name": "model.safetensors",
            "bytes": file.stat().st_size,
            "header_sha256": hashlib.sha256(file.read_bytes()[: 8 + length]).hexdigest(),
        }
    ]
    assert record["source"]["config_sha256"] == hashlib.sha256((source / "config.json").read_bytes()).hexdigest()
    conversion = record["conversion"]
    assert (conversion["method"], conversion["seed"]) == ("random", 3)
    assert (conversion["before"]["kv_heads"], conversion["after"]["kv_heads"]) == (8, 4)
    assert conversion["config_edits"] == {"num_key_value_heads": 4}
    assert len(record["merged"]) == 4
    assert record["versions"]["transformers"]
    assert str(tmp_path) not in text


@pytest.mark.parametrize("legacy", [False, True])
def test_pickled_weights_become_safetensors(legacy: bool, tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "llama-bias")
    tensors = factories.tensors_of(source)
    expected = factories.tensors_of(convert(source, groups=4, out=tmp_path / "expected").out)
    (source / "model.safetensors").unlink()
    torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    out = convert(source, groups=4).out
    assert not (out / "pytorch_model.bin").exists()
    actual = factories.tensors_of(out)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(x, actual[key]) for key, x in expected.items())
    factories.load(out)


def test_sharded_pickled_weights(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    tensors = factories.tensors_of(source)
    (source / "model.safetensors").unlink()
    keys = list(tensors)
    parts = {"pytorch_model-00001-of-00002.bin": keys[:9], "pytorch_model-00002-of-00002.bin": keys[9:]}
    for name, part in parts.items():
        torch.save({key: tensors[key] for key in part}, source / name)
    weight_map = {key: name for name, part in parts.items() for key in part}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    out = convert(source, groups=2).out
    names = {file.name for file in factories.weight_files(out)}
    assert names == {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert json.loads((out / INDEX).read_text())["weight_map"].keys() == tensors.keys()
    factories.load(out)


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "qwen2")
    factories.change_config(source, tie_word_embeddings=True)
    factories.change_tensors(source, lambda tensors: tensors.pop("lm_head.weight"))
    out = convert(source, groups=2).out
    model = factories.load(out, "qwen2")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_hub_cache_of_links_gives_plain_files(tmp_path: Path) -> None:
    plain = factories.make(tmp_path / "plain")
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, file in enumerate(plain.iterdir()):
        file.rename(repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    out = convert(snapshot, groups=2, out=tmp_path / "out").out
    assert not any(file.is_symlink() for file in out.iterdir())
    factories.load(out)


def test_default_target_lies_beside_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = factories.make(tmp_path / "model")
    assert convert(source, groups=4).out == tmp_path / "model-gqa4"
    monkeypatch.chdir(source)
    assert convert(".", groups=2).out == tmp_path / "model-gqa2"
    monkeypatch.chdir(tmp_path)
    assert convert("model/", groups=1).out == tmp_path / "model-gqa1"


def test_force_replaces_a_conversion_whole(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    (source / "stale.txt").write_text("from before")
    out = convert(source, groups=4).out
    assert (out / "stale.txt").exists()
    (source / "stale.txt").unlink()
    convert(source, groups=2, out=out, force=True)
    assert not (out / "stale.txt").exists()
    assert factories.load(out).config.num_key_value_heads == 2
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["source", "source-gqa4"]


def test_an_old_output_that_a_kill_left_half_removed_is_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = factories.make(tmp_path / "source"), tmp_path / "out"
    convert(source, groups=2, out=out)
    removed = shutil.rmtree

    def killed_half_way(folder: Path, **settings: Any) -> None:
        (folder / "gqa_convert.json").unlink(missing_ok=True)  # the record of whose it is goes first, and nothing else

    monkeypatch.setattr(shutil, "rmtree", killed_half_way)
    convert(source, groups=4, out=out, force=True)
    monkeypatch.setattr(shutil, "rmtree", removed)
    left = [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert len(left) == 1
    dead = subprocess.Popen(["true"])  # its number is no process's any more
    dead.wait()
    (tmp_path / left[0]).rename(tmp_path / left[0].replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    convert(source, groups=2, out=out, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_progress_adds_up_to_the_bytes_written(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", shard_size="60KB")
    told: list[int] = []
    result = convert(source, groups=4, on_bytes=told.append)
    assert sum(told) == result.plan.bytes_out
    assert min(told) > 0


def test_threads_of_torch_are_given_back(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        convert(factories.make(tmp_path / "source"), groups=4)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_two_lines_of_the_docstring_work(tmp_path: Path) -> None:
    factories.make(tmp_path / "my-model")
    script = 'from gqa_convert import convert\nconvert("my-model", groups=8)\n'
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    assert (tmp_path / "my-model-gqa8" / "config.json").is_file()
