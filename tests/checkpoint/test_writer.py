from __future__ import annotations

import errno
import json
import os
import tracemalloc
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gqa_convert.checkpoint import copying, writer
from gqa_convert.checkpoint.copying import copy_span
from gqa_convert.checkpoint.flushing import Flusher
from gqa_convert.checkpoint.reader import Checkpoint
from gqa_convert.checkpoint.safetensors_file import build_header
from gqa_convert.checkpoint.writer import TargetTensor, write_index, write_shard
from gqa_convert.errors import CheckpointError

from .helpers import raw_safetensors, sharded, single, tensors


def halved(checkpoint: Checkpoint, key: str) -> TargetTensor:
    info = checkpoint.tensors[key]
    return TargetTensor(
        key=key,
        dtype=info.dtype,
        shape=(info.shape[0] // 2, *info.shape[1:]),
        produce=lambda: checkpoint.tensor(key)[: info.shape[0] // 2],
    )


def targets(checkpoint: Checkpoint) -> list[TargetTensor]:
    """Halve every k and v, copy the rest."""
    return [
        halved(checkpoint, key) if key.split(".")[-2] in "kv" else TargetTensor.copy_of(info)
        for key, info in checkpoint.tensors.items()
    ]


def check(path: Path, table: dict[str, torch.Tensor]) -> None:
    written = load_file(path)
    assert written.keys() == table.keys()
    for key, value in table.items():
        expected = value[: value.shape[0] // 2] if key.split(".")[-2] in "kv" else value
        assert torch.equal(written[key], expected), key
        assert written[key].dtype == expected.dtype


def test_copies_and_computed_tensors_side_by_side(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path))
    seen: list[int] = []
    wanted = targets(checkpoint)

    write_shard(tmp_path / "out", wanted, checkpoint.shards[0].metadata, seen.append)

    check(tmp_path / "out", tensors())
    assert sum(seen) == sum(target.nbytes for target in wanted)


@pytest.mark.parametrize("size", [100, 4096, 5000, 300_001])
def test_spans_of_any_size_and_place(tmp_path: Path, size: int) -> None:
    table = {f"{i}.{name}.weight": torch.randint(256, (size * 2,)).to(torch.uint8) for i in range(3) for name in "akvz"}
    checkpoint = Checkpoint.open(single(tmp_path, table))
    write_shard(tmp_path / "out", targets(checkpoint), {})
    check(tmp_path / "out", table)


def no_kernel_copy(monkeypatch: pytest.MonkeyPatch, *broken: str) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "not here")

    for name in broken:
        monkeypatch.setattr(os, name, refuse)


@pytest.mark.parametrize("broken", [[], ["copy_file_range"], ["copy_file_range", "sendfile"]])
def test_every_way_of_copying_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: list[str]
) -> None:
    checkpoint = Checkpoint.open(single(tmp_path))
    no_kernel_copy(monkeypatch, *broken)
    write_shard(tmp_path / "out", targets(checkpoint), {})
    check(tmp_path / "out", tensors())


def test_a_kernel_that_answers_zero_is_worked_around(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(single(tmp_path))
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    write_shard(tmp_path / "out", targets(checkpoint), {})
    check(tmp_path / "out", tensors())


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(single(tmp_path))
    no_kernel_copy(monkeypatch, "copy_file_range", "sendfile")
    write, preadv = os.write, os.preadv
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, data[: max(1, len(data) // 2)]))
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at: preadv(fd, [bufs[0][: max(1, len(bufs[0]) // 3)]], at))
    write_shard(tmp_path / "out", targets(checkpoint), {})
    check(tmp_path / "out", tensors())


def test_an_untouched_shard_is_the_same_file(tmp_path: Path) -> None:
    sharded(tmp_path, 2)
    for shard in Checkpoint.open(tmp_path).shards:
        write_shard(tmp_path / "out", [TargetTensor.copy_of(i) for i in shard.tensors.values()], shard.metadata)
        assert (tmp_path / "out").read_bytes() == shard.file.read_bytes()


def test_neighbours_are_copied_as_one_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spans: list[int] = []
    real = copy_span
    monkeypatch.setattr(writer, "copy_span", lambda *args: (spans.append(args[3]), real(*args)))
    checkpoint = Checkpoint.open(single(tmp_path))

    write_shard(tmp_path / "out", [TargetTensor.copy_of(info) for info in checkpoint.tensors.values()], {})
    assert spans == [checkpoint.total_bytes]

    spans.clear()
    write_shard(tmp_path / "out", targets(checkpoint), {})
    assert len(spans) == 3  # embed to layer 0's k, its v to layer 1's k (o, q, norm between), and the rest


def test_tensors_keep_their_place_within_a_disk_block(tmp_path: Path) -> None:
    """Kernel copies are more than twice as fast if they do; see `copying.BLOCK`."""
    big = {"a.weight": torch.zeros(3 << 20, dtype=torch.uint8), "b.k.weight": torch.zeros(4096 * 16, dtype=torch.uint8)}
    big |= {"c.weight": torch.zeros(5 << 20, dtype=torch.uint8), "d.k.weight": torch.zeros(12, dtype=torch.uint8)}
    checkpoint = Checkpoint.open(single(tmp_path / "in", big))

    write_shard(single(tmp_path / "out") / "model.safetensors", targets(checkpoint), {"a": "much longer header" * 9})

    written = Checkpoint.open(tmp_path / "out")
    for key in ("a.weight", "c.weight"):
        assert (written.tensors[key].offset - checkpoint.tensors[key].offset) % copying.BLOCK == 0
    check(tmp_path / "out" / "model.safetensors", big)


def test_tensors_may_come_from_several_files(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(sharded(tmp_path, 3))
    write_shard(tmp_path / "out", [TargetTensor.copy_of(checkpoint.tensors[key]) for key in tensors()], {})
    written = load_file(tmp_path / "out")
    assert all(torch.equal(written[key], value) for key, value in tensors().items())


def test_metadata_is_kept_and_the_format_added(tmp_path: Path) -> None:
    for given, expected in (
        ({}, {"format": "pt"}),
        ({"format": "mlx", "a": "b"}, {"format": "mlx", "a": "b"}),
        ({"note": "x"}, {"format": "pt", "note": "x"}),
    ):
        write_shard(
            tmp_path / "out", [TargetTensor(key="x", dtype="F32", shape=(1,), produce=lambda: torch.ones(1))], given
        )
        with safe_open(tmp_path / "out", "pt") as file:
            assert file.metadata() == expected


@pytest.mark.parametrize(
    "computed",
    [torch.ones(2, 3), torch.ones(3, 2, dtype=torch.float16), torch.ones(6), torch.ones(3, 2, dtype=torch.cdouble)],
)
def test_a_computed_tensor_must_be_what_was_announced(tmp_path: Path, computed: torch.Tensor) -> None:
    with pytest.raises(CheckpointError):
        write_shard(tmp_path / "out", [TargetTensor(key="x", dtype="F32", shape=(3, 2), produce=lambda: computed)], {})


def test_computed_tensors_of_any_layout_and_dtype(tmp_path: Path) -> None:
    computed = {
        "bf16": torch.randn(4, 3).to(torch.bfloat16),
        "fp8": torch.randn(4, 3).to(torch.float8_e5m2),
        "strided": torch.randn(3, 4).t(),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 3),
        "grad": torch.randn(4, requires_grad=True),
        "flags": torch.tensor([True, False]),
    }
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64"}
    wanted = [
        TargetTensor(
            key=key, dtype=names.get(t.dtype, "BOOL"), shape=tuple(t.shape), produce=partial(computed.__getitem__, key)
        )
        for key, t in computed.items()
    ]
    write_shard(tmp_path / "out", wanted, {})
    written = load_file(tmp_path / "out")
    for key, t in computed.items():
        assert written[key].dtype == t.dtype
        assert torch.equal(written[key].float(), t.detach().float())


def test_formats_unknown_to_torch_are_copied(tmp_path: Path) -> None:
    entries = {
        "four": {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]},
        "six": {"dtype": "F6_E2M3", "shape": [2, 4], "data_offsets": [6, 12]},
    }
    (tmp_path / "model.safetensors").write_bytes(raw_safetensors(entries, bytes(range(12))))
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint.open(tmp_path)
    write_shard(tmp_path / "out", [TargetTensor.copy_of(info) for info in checkpoint.tensors.values()], {})
    assert (tmp_path / "out").read_bytes().endswith(bytes(range(12)))


def test_formats_that_no_installed_library_reads_are_refused(tmp_path: Path) -> None:
    entries = {"new": {"dtype": "X9", "shape": [5], "data_offsets": [0, 14]}}
    (tmp_path / "model.safetensors").write_bytes(raw_safetensors(entries, bytes(range(14))))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="'new' is of dtype 'X9', which the installed safetensors does not know"):
        Checkpoint.open(tmp_path)


def test_a_target_has_exactly_one_origin_and_the_shape_of_its_source(tmp_path: Path) -> None:
    info = Checkpoint.open(single(tmp_path)).tensors["embed.weight"]
    for bad in (
        {"dtype": "BF16", "shape": (11, 8)},
        {"dtype": "BF16", "shape": (11, 8), "source": info, "produce": lambda: torch.ones(1)},
        {"dtype": "BF16", "shape": (8, 11), "source": info},
        {"dtype": "F32", "shape": (11, 8), "source": info},
        {"dtype": "X9", "shape": (1,), "produce": lambda: torch.ones(1)},
    ):
        with pytest.raises(ValueError):
            TargetTensor(key="x", **bad)


def test_a_source_that_shrinks_is_noticed(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path))
    wanted = [TargetTensor.copy_of(info) for info in checkpoint.tensors.values()]
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(1500)
    with pytest.raises(CheckpointError, match="ended"):
        write_shard(tmp_path / "out", wanted, {})


def test_a_source_that_vanishes_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(single(tmp_path))
    wanted = [TargetTensor.copy_of(info) for info in checkpoint.tensors.values()]
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        write_shard(tmp_path / "out", wanted, {})


def test_progress_comes_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "PIECE", 8192)
    table = {"a.weight": torch.zeros(50_000, dtype=torch.uint8), "b.weight": torch.zeros(50_000, dtype=torch.uint8)}
    checkpoint = Checkpoint.open(single(tmp_path, table))
    copy = TargetTensor.copy_of(checkpoint.tensors["a.weight"])
    computed = TargetTensor(key="b", dtype="U8", shape=(50_000,), produce=lambda: table["b.weight"])
    seen: list[int] = []

    write_shard(tmp_path / "out", [copy, computed], {}, seen.append)

    assert sum(seen) == 100_000
    assert max(seen) <= 8192


def test_copying_takes_no_memory(tmp_path: Path) -> None:
    table = {"a.weight": torch.zeros(40 << 20, dtype=torch.uint8)}
    checkpoint = Checkpoint.open(single(tmp_path, table))
    wanted = [TargetTensor.copy_of(checkpoint.tensors["a.weight"])]
    tracemalloc.start()
    write_shard(tmp_path / "out", wanted, {})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_the_index_is_what_transformers_writes(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.is_sharded

    weight_map = {key: shard.name for shard in checkpoint.shards for key in shard.tensors}
    write_index(
        tmp_path / "ours.json",
        weight_map,
        checkpoint.total_bytes,
        sum(info.numel for info in checkpoint.tensors.values()),
    )

    assert (tmp_path / "ours.json").read_bytes() == (tmp_path / "model.safetensors.index.json").read_bytes()


def test_a_flusher_passes_on_what_the_disk_says(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with Flusher() as flusher:
        flusher.flush(tmp_path / "a")
    with pytest.raises(FileNotFoundError), Flusher() as flusher:
        flusher.flush(tmp_path / "gone")
    with pytest.raises(ZeroDivisionError), Flusher() as flusher:
        flusher.flush(tmp_path / f"gone{1 // 0}")


def test_headers_are_equal_to_those_of_safetensors(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "x.safetensors"}))
    shard = Checkpoint.open(tmp_path).shards[0]
    header = build_header([(t.key, t.dtype, t.shape, t.nbytes) for t in shard.tensors.values()], {"format": "pt"})
    assert shard.file.read_bytes()[: len(header)] == header
