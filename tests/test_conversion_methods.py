"""The `first` and `random` methods through a whole conversion."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gqa_convert import convert
from tests import factories
from tests.factories import FAMILIES, HEADS

PROJECTION = re.compile(r"\.(k_proj|v_proj)\.weight$")


def projections(folder: Path) -> factories.Tensors:
    return {key: x for key, x in factories.tensors_of(folder).items() if PROJECTION.search(key)}


@pytest.mark.parametrize("family", ["llama-bias", "olmo2", "cohere", "stablelm", "phi3", "gpt_bigcode"])
def test_first_copies_heads_bit_for_bit(family: str, tmp_path: Path) -> None:
    kind = FAMILIES[family]
    groups = kind.groups[0]
    source = factories.make(tmp_path / "source", family, dtype=torch.bfloat16)
    before = factories.tensors_of(source)
    after = factories.tensors_of(convert(source, groups=groups, method="first").out)
    size = HEADS // groups
    for key, x in after.items():
        listed = re.search(kind.listed, key)
        if re.search(kind.heads_axis, key):
            expected = before[key].reshape(groups, size, -1)[:, 0]
        elif re.search(kind.fused, key) and not kind.per_head:
            q, k, v = factories.split_fused(before[key], HEADS)
            width = before[key].shape[-1]
            first = [part.reshape(groups, size, -1, width)[:, 0].reshape(-1, width) for part in (k, v)]
            expected = torch.cat([q, *first])
        elif re.search(kind.fused, key):
            q, k, v = before[key].reshape(HEADS, 3, 8, -1).unbind(1)
            expected = torch.cat([q.reshape(64, -1), k[0], v[0]])
        elif listed:
            head = int(listed.group(1))
            expected = before[f"{key[: listed.start(1)]}{head * size}{key[listed.end(1) :]}"]
        else:
            expected = before[key]
        assert torch.equal(x, expected.reshape(x.shape)), key


def test_random_heads_are_as_wide_as_the_old_ones(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")
    before, after = projections(source), projections(convert(source, groups=4, method="random").out)
    for key, x in after.items():
        assert float(x.std()) == pytest.approx(float(before[key].std()), rel=0.1)
        assert x.mean().abs() < 0.02
        old_rows = {factories.as_bytes(row) for row in before[key]}
        assert not any(factories.as_bytes(row) in old_rows for row in x)
    drawn = [factories.as_bytes(x) for x in after.values()]
    assert len(set(drawn)) == len(drawn)


def test_random_leaves_biases_and_norms_to_the_mean(tmp_path: Path) -> None:
    for family in ("llama-bias", "olmo2", "cohere", "stablelm"):
        source = factories.make(tmp_path / family, family)
        mean, random = (
            factories.tensors_of(convert(source, groups=4, method=method, out=tmp_path / f"{family}-{method}").out)
            for method in ("mean", "random")
        )
        assert all(torch.equal(x, mean[key]) for key, x in random.items() if not PROJECTION.search(key))
        assert not any(torch.equal(x, mean[key]) for key, x in random.items() if PROJECTION.search(key))


def test_a_seed_gives_the_same_heads_and_another_seed_others(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source")

    def drawn(name: str, seed: int) -> factories.Tensors:
        return projections(convert(source, groups=2, method="random", seed=seed, out=tmp_path / name).out)

    once, again, other = drawn("once", 7), drawn("again", 7), drawn("other", 8)
    assert all(torch.equal(x, again[key]) for key, x in once.items())
    assert not any(torch.equal(x, other[key]) for key, x in once.items())


def test_random_heads_do_not_depend_on_the_order_of_tensors(tmp_path: Path) -> None:
    """The same model in one file or in many, listed forwards or backwards, gets the same heads."""
    whole = factories.make(tmp_path / "whole")
    shards = factories.make(tmp_path / "shards", shard_size="40KB")
    assert len(factories.weight_files(shards)) > 3
    one, two = (projections(convert(folder, groups=4, method="random").out) for folder in (whole, shards))
    assert all(torch.equal(x, two[key]) for key, x in one.items())


@pytest.mark.parametrize("method", ["first", "random"])
def test_equal_groups_change_nothing_whatever_the_method(method: str, tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "olmo2")
    out = convert(source, groups=HEADS, method=method).out
    assert (out / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()
