"""A merge method that draws, added in one file: the seed reaches it wherever tensors are merged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gqa_convert import convert, plan
from gqa_convert.conversion.inspect import verify_pair
from gqa_convert.conversion.operations import Pool
from gqa_convert.conversion.recipe import Recipe
from gqa_convert.errors import VerificationError
from gqa_convert.heads import Grouping, merge_heads, split_groups
from gqa_convert.merge import registry
from gqa_convert.merge.registry import merge_method
from tests import factories
from tests.support import Command

K = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture(autouse=True)
def lottery() -> Iterator[None]:
    """Of each group a head by lot."""

    @merge_method(
        name="lottery",
        title="of each group a head by lot",
        reference="this test",
        needs_statistics=False,
        touches_query_output=False,
        draws=True,
    )
    def pool(x: torch.Tensor, grouping: Grouping, dim: int, *, generator: Any = None, std: Any = None) -> torch.Tensor:
        heads = split_groups(x, grouping, dim % x.dim())
        chosen = int(torch.randint(grouping.group_size, (1,), generator=generator))
        return merge_heads(heads.select(dim % x.dim() + 1, chosen), dim % x.dim())

    yield
    del registry._METHODS["lottery"]


def keys_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: x for key, x in factories.tensors_of(folder).items() if ".k_proj." in key or ".v_proj." in key}


def test_the_seed_reaches_it_and_is_recorded(tmp_path: Path, command: Command) -> None:
    source = factories.make(tmp_path / "source")
    for seed in (1, 2, 1):
        out = tmp_path / str(seed)
        arguments = ("--groups", 1, "--method", "lottery", "--seed", seed, "--out", out, "--force")
        assert command("gqa", "convert", source, *arguments).code == 0
    first, second = keys_of(tmp_path / "1"), keys_of(tmp_path / "2")
    again = keys_of(convert(source, groups=1, method="lottery", seed=1, out=tmp_path / "again").out)
    assert all(torch.equal(x, again[key]) for key, x in first.items())
    assert any(not torch.equal(x, second[key]) for key, x in first.items())
    for seed in (1, 2):
        assert verify_pair(source, tmp_path / str(seed))["merged"] == len(first)
    record = json.loads((tmp_path / "2" / "gqa_convert.json").read_text())
    assert record["conversion"]["recipe"]["seed"] == 2
    record["conversion"]["recipe"]["seed"] = 1
    (tmp_path / "2" / "gqa_convert.json").write_text(json.dumps(record))
    with pytest.raises(VerificationError, match="is not what converting"):
        verify_pair(source, tmp_path / "2")


def test_it_draws_for_projections_alone(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "cohere")
    pools = [x for x in plan(source, groups=2, method="lottery", seed=5).operations if isinstance(x, Pool)]
    assert {("_proj" in pool.key, pool.method) for pool in pools} == {(True, "lottery"), (False, "mean")}
    assert {pool.seed for pool in pools} == {5}


def test_groups_may_be_searched_for_it(tmp_path: Path) -> None:
    source = factories.make(tmp_path / "source", "llama-bias")
    recipes = [Recipe(method="lottery", grouping="search", seed=seed) for seed in (1, 2, 1)]
    folders = [
        convert(source, groups=2, recipe=recipe, out=tmp_path / f"{n}", verify="logits").out
        for n, recipe in enumerate(recipes)
    ]
    first, second, again = map(keys_of, folders)
    assert all(torch.equal(x, again[key]) for key, x in first.items())
    assert any(not torch.equal(x, second[key]) for key, x in first.items())
    assert verify_pair(source, folders[1])["solved"] > 0
