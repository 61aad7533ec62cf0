from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from gqa_convert.checkpoint.dtypes import BITS, dtype_name, from_bytes, read_bytes, tensor_bytes
from gqa_convert.checkpoint.safetensors_file import build_header, read_header, torch_dtype
from gqa_convert.errors import CheckpointError

from .helpers import raw_safetensors, tensors

KEYS = st.text(min_size=1, max_size=12).filter(lambda key: key != "__metadata__" and key.isprintable())
ENTRIES = st.dictionaries(
    KEYS,
    st.tuples(
        st.sampled_from(["F32", "BF16", "U8", "I64", "F8_E4M3", "BOOL"]), st.lists(st.integers(0, 4), max_size=3)
    ),
    max_size=5,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    entries=ENTRIES,
    metadata=st.dictionaries(KEYS, st.text(max_size=5).filter(str.isprintable), max_size=2),
    padding=st.integers(0, 3).map(lambda n: 8 * n),
)
def test_what_is_built_is_what_is_read_by_us_and_by_safetensors(
    tmp_path: Path, entries: dict[str, tuple[str, list[int]]], metadata: dict[str, str], padding: int
) -> None:
    table = [
        (key, dtype, shape, torch.Size(shape).numel() * BITS[dtype] // 8) for key, (dtype, shape) in entries.items()
    ]
    header = build_header(table, metadata, padding)
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(sum(entry[3] for entry in table)))

    infos, found_metadata = read_header(path)

    assert len(header) % 8 == 0
    assert found_metadata == metadata
    assert {key: (info.dtype, list(info.shape)) for key, info in infos.items()} == entries
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(entries)
        assert (file.metadata() or {}) == metadata
        for key, (_, shape) in entries.items():
            assert list(file.get_slice(key).get_shape()) == shape


def test_offsets_are_absolute_and_in_file_order(tmp_path: Path) -> None:
    table = tensors() | {"count": torch.arange(3), "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5)}
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(table, path, metadata={"format": "pt"})
    raw = path.read_bytes()

    infos, metadata = read_header(path)

    assert metadata == {"format": "pt"}
    assert infos.keys() == table.keys()
    assert [info.offset for info in infos.values()] == sorted(info.offset for info in infos.values())
    for key, info in infos.items():
        assert raw[info.offset : info.offset + info.nbytes] == bytes(tensor_bytes(table[key]))
        assert torch.equal(from_bytes(read_bytes(path, info.offset, info.nbytes), info.dtype, info.shape), table[key])


def test_a_header_rebuilt_from_a_safetensors_file_is_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors(), path, metadata={"format": "pt"})
    infos, metadata = read_header(path)

    header = build_header([(i.key, i.dtype, i.shape, i.nbytes) for i in infos.values()], metadata)

    assert path.read_bytes().startswith(header)


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
LIES = {
    "empty file": (b"", "too few"),
    "header longer than the file": (raw_safetensors({"a": ONE}, bytes(8), length=10_000), "Download it again"),
    "absurd header length": (raw_safetensors({"a": ONE}, bytes(8), length=2**62), "not a safetensors file"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "an HTML page": (b"<!DOCTYPE html><html></html>", "not a safetensors file"),
    "not JSON": (raw_safetensors(b'{"a": '), "not valid JSON"),
    "not UTF-8": (raw_safetensors(b'{"\xff": 1}'), "not valid JSON"),
    "a key that is no text": (raw_safetensors({"\ud800": ONE}, bytes(8)), "not valid JSON"),
    "a list": (raw_safetensors(b"[1, 2]"), "does not start with"),
    "nested without end": (raw_safetensors(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "truncated data": (raw_safetensors({"a": ONE}, bytes(5)), "truncated: expects 77 bytes, file has 74"),
    "bytes too many": (raw_safetensors({"a": ONE}, bytes(9)), "follow the last tensor"),
    "key twice": (raw_safetensors(b'{"a":1,"a":2}'), "'a' twice"),
    "overlap": (raw_safetensors({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12)), "overlaps"),
    "hole": (raw_safetensors({"a": ONE, "b": {**ONE, "data_offsets": [9, 17]}}, bytes(17)), "hole"),
    "hole at the start": (raw_safetensors({"a": {**ONE, "data_offsets": [8, 16]}}, bytes(16)), "hole"),
    "shape too large": (raw_safetensors({"a": {**ONE, "shape": [3]}}, bytes(8)), "takes 12 bytes"),
    "more elements than numbers can say": (
        raw_safetensors({"a": {**ONE, "shape": [2**62] * 60}}, bytes(8)),
        "more elements",
    ),
    "a size of 2^63": (raw_safetensors({"a": {**ONE, "shape": [2**63]}}, bytes(8)), "malformed"),
    "a size of 5,000 digits": (
        raw_safetensors(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}', bytes(8)),
        "not valid JSON",
    ),
    "more axes than tensors have": (raw_safetensors({"a": {**ONE, "shape": [1] * 100_000}}, bytes(8)), "malformed"),
    "a dtype that is no text": (raw_safetensors({"a": {**ONE, "dtype": "\ud800"}}, bytes(8)), "malformed"),
    "metadata that is no text": (
        raw_safetensors({"__metadata__": {"a": "\ud800"}, "a": ONE}, bytes(8)),
        "surrogate",
    ),
    "metadata keys that are no text": (
        raw_safetensors({"__metadata__": {"\udfff": "a"}, "a": ONE}, bytes(8)),
        "surrogate",
    ),
    "a long header of something else": (raw_safetensors(b'{"a":[' + b"[]," * 3_000_000 + b"[]]}"), "something else"),
    "begin after end": (raw_safetensors({"a": {**ONE, "data_offsets": [8, 0]}}, bytes(8)), "malformed"),
    "negative offset": (raw_safetensors({"a": {**ONE, "data_offsets": [-8, 0]}}, bytes(8)), "malformed"),
    "fractional offset": (raw_safetensors({"a": {**ONE, "data_offsets": [0, 8.0]}}, bytes(8)), "malformed"),
    "boolean size": (raw_safetensors({"a": {**ONE, "shape": [True, 2]}}, bytes(8)), "malformed"),
    "no dtype": (raw_safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "malformed"),
    "entry is a number": (raw_safetensors({"a": 7}, bytes(8)), "malformed"),
    "three offsets": (raw_safetensors({"a": {**ONE, "data_offsets": [0, 4, 8]}}, bytes(8)), "malformed"),
    "metadata not text": (raw_safetensors({"__metadata__": {"n": 1}, "a": ONE}, bytes(8)), "__metadata__"),
}


@pytest.mark.parametrize("lie", LIES)
def test_every_lie_of_a_header_is_named(tmp_path: Path, lie: str) -> None:
    content, says = LIES[lie]
    path = tmp_path / "model-00001-of-00002.safetensors"
    path.write_bytes(content)

    with pytest.raises(CheckpointError) as caught:
        read_header(path)

    assert says in str(caught.value)
    assert path.name in str(caught.value)


def test_formats_without_a_torch_dtype_can_be_described_but_not_computed_with(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entries = {
        "four": {"dtype": "F4", "shape": [3, 4], "data_offsets": [0, 6]},
        "new": {"dtype": "X9", "shape": [5], "data_offsets": [6, 20]},
    }
    path.write_bytes(raw_safetensors(entries, bytes(20)))

    infos, _ = read_header(path)

    assert (infos["four"].nbytes, infos["new"].nbytes) == (6, 14)
    with pytest.raises(CheckpointError, match="F4"):
        torch_dtype("F4")


def test_dtype_names_are_those_of_safetensors() -> None:
    from safetensors.torch import _TYPES

    for name, dtype in _TYPES.items():
        assert torch_dtype(name) is dtype
        assert dtype_name(dtype) == name
    with pytest.raises(CheckpointError, match="complex128"):
        dtype_name(torch.complex128)


def test_a_key_cannot_be_written_twice() -> None:
    with pytest.raises(CheckpointError, match="twice"):
        build_header([("a", "U8", (1,), 1), ("a", "U8", (1,), 1)], {})


def test_one_of_very_many_names_doubled_is_found_at_once(tmp_path: Path) -> None:
    """Comparing each with each would take hours."""
    names = [f"layers.{number}.weight" for number in range(200_000)]
    entry = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})
    text = "{" + ",".join(f'"{name}":{entry}' for name in [*names, names[-2]]) + "}"
    (tmp_path / "a.safetensors").write_bytes(raw_safetensors(text.encode()))
    with pytest.raises(CheckpointError, match=r"'layers\.199998\.weight' twice"):
        read_header(tmp_path / "a.safetensors")
