"""Converting, over a spread of architectures: the weights, their files, and what stock transformers makes of them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_convert import convert
from tests import factories
from tests.factories import FAMILIES, HEADS

CASES = [(family, groups) for family, kind in FAMILIES.items() for groups in kind.groups]


@dataclass(frozen=True)
class Tied:
    """A random GQA checkpoint, the MHA one that says the same with tied heads, and that one converted."""

    family: str
    groups: int
    reference: Path
    source: Path
    converted: Path


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def tied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tied:
    family, groups = request.param
    folder = tmp_path_factory.mktemp("tied")
    reference = factories.make(folder / "reference", family, kv_heads=groups, seed=groups)
    source = factories.make_tied(folder / "source", reference, family, groups)
    out = convert(source, groups=groups, out=folder / "converted").out
    return Tied(family, groups, reference, source, out)


def test_tied_heads_merge_exactly(tied: Tied) -> None:
    expected, actual = factories.tensors_of(tied.reference), factories.tensors_of(tied.converted)
    assert actual.keys() == expected.keys()
    differing = [key for key, x in expected.items() if factories.as_bytes(actual[key]) != factories.as_bytes(x)]
    assert not differing


def test_tied_heads_keep_the_function(tied: Tied) -> None:
    before, after = (factories.load(folder, tied.family) for folder in (tied.source, tied.converted))
    expected = factories.logits(before)
    assert expected.std() > 0.01
    torch.testing.assert_close(factories.logits(after), expected, atol=1e-5, rtol=1e-5)


def test_config_says_what_a_model_of_that_shape_would_say(tied: Tied) -> None:
    expected, actual = (json.loads((folder / "config.json").read_text()) for folder in (tied.reference, tied.converted))
    assert actual == expected


def test_the_cache_shrinks(tied: Tied) -> None:
    model = factories.load(tied.converted, tied.family)
    cache = model(input_ids=factories.token_ids(), use_cache=True).past_key_values
    assert {layer.keys.shape[1] for layer in cache.layers} == {tied.groups}
    assert {layer.values.shape[1] for layer in cache.layers} == {tied.groups}


@pytest.mark.parametrize("family", FAMILIES)
def test_as_many_groups_as_heads_changes_no_byte(family: str, tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", family, shard_size="60KB")
    out = convert(source, groups=HEADS).out
    names = {file.name for file in source.iterdir()}
    assert sum(name.endswith(".safetensors") for name in names) > 1
    assert {file.name for file in out.iterdir()} == names | {"gqa_convert.json", "README.md"}
    differing = [name for name in names if (source / name).read_bytes() != (out / name).read_bytes()]
    assert [name for name in differing if not name.endswith(".index.json")] == []
    for name in differing:
        assert json.loads((source / name).read_text()) == json.loads((out / name).read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_only_what_holds_kv_heads_changes(family: str, tmp_path: Path) -> None:
    kind = FAMILIES[family]
    source = factories.make(tmp_path / "source", family)
    out = convert(source, groups=kind.groups[-1]).out
    before, after = factories.tensors_of(source), factories.tensors_of(out)
    changed = {key for key, x in before.items() if key not in after or not torch.equal(x, after[key])}
    patterns = (kind.heads_axis, kind.fused, kind.listed)
    assert changed == {key for key in before if any(re.search(pattern, key) for pattern in patterns)}
    factories.load(out, family)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_mean_is_that_of_adjacent_heads_in_float32(groups: int, dtype: torch.dtype, tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "llama-bias", dtype=dtype)
    before = factories.tensors_of(source)
    after = factories.tensors_of(convert(source, groups=groups).out)
    for key in (key for key in before if re.search(FAMILIES["llama-bias"].heads_axis, key)):
        heads = before[key].double().reshape(groups, HEADS // groups, 8, -1)
        expected = heads.mean(dim=1).reshape(after[key].shape)
        assert after[key].dtype == dtype
        tolerance = max(torch.finfo(dtype).eps, 1e-7)
        torch.testing.assert_close(after[key].double(), expected, rtol=tolerance, atol=tolerance)
        strided = heads.reshape(HEADS // groups, groups, 8, -1).mean(dim=0).reshape(expected.shape)
        assert groups == 1 or (strided - expected).abs().max() > 0.1


def test_query_rows_of_a_fused_projection_stay(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "phi3")
    key = "model.layers.1.self_attn.qkv_proj.weight"
    before, after = factories.tensors_of(source)[key], factories.tensors_of(convert(source, groups=2).out)[key]
    q, k, v = factories.split_fused(before, HEADS)
    new_q, new_k, new_v = factories.split_fused(after, 2)
    assert torch.equal(new_q, q)
    torch.testing.assert_close(new_k, k.reshape(2, 4, 8, -1).mean(1).reshape(16, -1))
    torch.testing.assert_close(new_v, v.reshape(2, 4, 8, -1).mean(1).reshape(16, -1))


def test_order_of_groups_does_not_matter(tmp_path: Path) -> None:
    """Permuting whole groups of heads in q, k, v and o leaves a model's function alone; so it must its conversion's."""
    order, groups, dim = [2, 0, 3, 1], 4, 8
    width = HEADS // groups * dim

    def permute(tensors: factories.Tensors) -> None:
        rows = torch.cat([torch.arange(g * width, (g + 1) * width) for g in order])
        for key, x in tensors.items():
            if re.search(r"\.[qkv]_proj\.(weight|bias)$", key):
                tensors[key] = x[rows]
            elif key.endswith(".o_proj.weight"):
                tensors[key] = x[:, rows]

    plain = factories.make(tmp_path / "plain", "llama-bias")
    permuted = factories.change_tensors(factories.make(tmp_path / "permuted", "llama-bias"), permute)
    sources = [factories.logits(factories.load(folder)) for folder in (plain, permuted)]
    converted = [convert(folder, groups=groups).out for folder in (plain, permuted)]
    results = [factories.logits(factories.load(folder)) for folder in converted]
    torch.testing.assert_close(sources[1], sources[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=1e-5)
    for key, x in factories.tensors_of(converted[0]).items():
        if re.search(r"\.[kv]_proj\.(weight|bias)$", key):
            other = factories.tensors_of(converted[1])[key]
            assert torch.equal(x.reshape(groups, dim, -1)[order], other.reshape(groups, dim, -1))


def test_grouped_source_to_fewer_groups(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", kv_heads=4)
    result = convert(source, groups=2)
    key = "model.layers.0.self_attn.v_proj.weight"
    before, after = factories.tensors_of(source)[key], factories.tensors_of(result.out)[key]
    torch.testing.assert_close(after, before.reshape(2, 2, 8, 64).mean(1).reshape(16, 64))
    assert (result.plan.layout_before.kind, result.plan.layout_after.kind) == ("GQA", "GQA")
    factories.load(result.out)


def test_two_steps_equal_one(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", dtype=torch.float64)
    once = convert(source, groups=2).out
    twice = convert(convert(source, groups=4).out, groups=2).out
    for key, x in factories.tensors_of(once).items():
        torch.testing.assert_close(factories.tensors_of(twice)[key], x)


def test_layers_outside_the_module_tree_are_merged_too(tmp_path: Path) -> None:
    """Multi-token-prediction layers are in the checkpoint but not in the model, and share the decoder's KV heads."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    sizes: dict[str, Any] = {**factories.SIZES, "num_hidden_layers": 2, "head_dim": 8, "first_k_dense_replace": 2}
    config = Glm4MoeConfig(**sizes, num_key_value_heads=HEADS, n_routed_experts=2, num_experts_per_tok=1)
    source = tmp_path / "source"
    Glm4MoeForCausalLM(config).save_pretrained(source)
    hidden = "model.layers.92.self_attn.k_proj.weight"

    def add_hidden_layer(tensors: factories.Tensors) -> None:
        tensors[hidden] = torch.randn(64, 64)

    factories.change_tensors(source, add_hidden_layer)
    result = convert(source, groups=4)
    before, after = factories.tensors_of(source)[hidden], factories.tensors_of(result.out)[hidden]
    torch.testing.assert_close(after, before.reshape(4, 2, 8, 64).mean(1).reshape(32, 64))
    assert any("multi-token-prediction" in note for note in result.plan.notes)


def test_vision_towers_keep_their_heads(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "llava")
    out = convert(source, groups=2).out
    before, after = factories.tensors_of(source), factories.tensors_of(out)
    towers = [key for key in before if key.startswith("vision_tower.") and "k_proj" in key]
    assert towers
    assert all(torch.equal(before[key], after[key]) for key in towers)
