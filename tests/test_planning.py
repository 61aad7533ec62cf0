"""The plan: every number in it is measured again here, on the files and on the running model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gqa_convert import convert, plan
from gqa_convert.errors import UsageError
from tests import factories
from tests.factories import FAMILIES
from tests.support import tree

CASES = [(family, kind.groups[0]) for family, kind in FAMILIES.items()]


def cache_bytes_per_token(folder: Path, family: str, dtype: torch.dtype) -> int:
    """Bytes that the loaded model's real cache takes for one position of one sequence."""
    model = factories.load(folder, family).to(dtype)
    ids = factories.token_ids(1, 9)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    total: int = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    return total // ids.shape[1]


@pytest.mark.parametrize(("family", "groups"), CASES)
def test_numbers_are_those_of_the_files_and_the_cache(family: str, groups: int, tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", family, dtype=torch.bfloat16)
    planned = plan(source, groups=groups)
    out = convert(source, groups=groups).out
    before, after = factories.tensors_of(source), factories.tensors_of(out)
    assert planned.bytes_in == sum(x.nbytes for x in before.values())
    assert planned.bytes_out == sum(x.nbytes for x in after.values())
    assert planned.parameters_in == sum(x.numel() for x in before.values())
    assert planned.parameters_out == sum(x.numel() for x in after.values())
    changed = [key for key, x in before.items() if key in after and not torch.equal(x, after[key])]
    assert planned.merged_tensors == len(changed)
    assert planned.copied_tensors == len(after) - len(changed)
    assert planned.dropped_tensors == len(before) - len(after)
    for folder, said in (
        (source, planned.kv_cache_bytes_per_token_before),
        (out, planned.kv_cache_bytes_per_token_after),
    ):
        assert said == cache_bytes_per_token(folder, family, torch.bfloat16)


def test_bytes_out_are_the_file_sizes_less_their_headers(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", shard_size="60KB")
    result = convert(source, groups=2)
    sizes = 0
    for file in factories.weight_files(result.out):
        with open(file, "rb") as stream:
            sizes += file.stat().st_size - 8 - int.from_bytes(stream.read(8), "little")
    assert result.plan.bytes_out == sizes


@pytest.mark.parametrize("family", ["llama", "llama-head-dim", "phi3", "cohere", "falcon", "llava"])
def test_layouts_are_those_of_the_model(family: str, tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", family)
    groups = FAMILIES[family].groups[-1]
    planned = plan(source, groups=groups)
    cache = factories.load(source, family)(input_ids=factories.token_ids(), use_cache=True).past_key_values
    assert planned.layout_before.num_query_heads == factories.HEADS
    assert planned.layout_before.num_kv_heads == cache.layers[0].keys.shape[1]
    assert planned.layout_before.head_dim == cache.layers[0].keys.shape[3]
    assert planned.layout_after.head_dim == planned.layout_before.head_dim
    assert planned.groups == planned.max_tensor_parallel == planned.layout_after.num_kv_heads == groups


def test_planning_writes_nothing_and_reads_no_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gqa_convert.checkpoint.reader import Checkpoint

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    source = factories.make(tmp_path / "source")
    monkeypatch.setattr(Checkpoint, "tensor", refuse)
    before = tree(tmp_path)
    planned = plan(source, groups=2)
    assert tree(tmp_path) == before
    assert not planned.target.exists()


def test_a_plan_is_json(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "stablelm")
    planned = plan(source, groups=2)
    described = json.loads(json.dumps(planned.to_json()))
    assert described["before"] == {"kind": "MHA", "query_heads": 8, "kv_heads": 8, "head_dim": 8}
    assert described["after"] == {"kind": "GQA", "query_heads": 8, "kv_heads": 2, "head_dim": 8}
    shapes = factories.shapes_of(source)
    assert {merge["key"] for merge in described["merges"]} <= shapes.keys()
    assert all(merge["from"] == shapes[merge["key"]] for merge in described["merges"])
    assert described["config_edits"] == {"num_key_value_heads": 2}


def test_equal_groups_plan_no_merge_but_know_the_cache(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    planned = plan(source, groups=8)
    assert (planned.merged_tensors, planned.config_edits) == (0, {})
    assert planned.kv_cache_bytes_per_token_before == planned.kv_cache_bytes_per_token_after == 2 * 2 * 64 * 4


@pytest.mark.parametrize("groups", [0, -1, 3, 5, 16])
def test_impossible_group_counts_name_the_possible_ones(groups: int, tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    with pytest.raises(UsageError, match=rf"--groups {groups}") as refused:
        plan(source, groups=groups)
    if groups > 0:
        assert "1, 2, 4, 8" in str(refused.value)


def test_working_memory_is_a_few_tensors(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    largest = max(x.nbytes for x in factories.tensors_of(source).values())
    assert 64 * 64 * 4 < plan(source, groups=4).working_bytes < 8 * largest
