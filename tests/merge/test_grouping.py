"""The search for groups."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_convert.errors import UsageError
from gqa_convert.heads import Grouping
from gqa_convert.merge import get_method
from gqa_convert.merge.apply import merge_block
from gqa_convert.merge.grouping import GroupCost, residual_cost, search_grouping
from gqa_convert.merge.maps import residual
from gqa_convert.merge.moments import BlockMoments, block_moments
from gqa_convert.merge.options import MergeOptions
from gqa_convert.merge.reference import attention
from tests.merge.random_blocks import make_block, make_inputs, make_statistics, regauged, tied


def partitions(heads: list[int], size: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    if not heads:
        yield ()
        return
    for others in itertools.combinations(heads[1:], size - 1):
        group = (heads[0], *others)
        for rest in partitions([h for h in heads if h not in group], size):
            yield (group, *rest)


def random_cost(seed: int) -> GroupCost:
    """Any cost at all, not only sums over pairs."""
    return lambda members: random.Random(f"{seed} {sorted(members)}").random() ** 3


@given(st.sampled_from([(4, 2), (6, 3), (6, 2), (8, 4), (8, 2), (9, 3), (6, 1), (6, 6)]), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_exact_search_finds_the_best_of_all(shape: tuple[int, int], seed: int) -> None:
    heads, groups = shape
    cost = random_cost(seed)
    searched = search_grouping(heads, groups, cost)
    best = min(sum(map(cost, p)) for p in partitions(list(range(heads)), heads // groups))
    assert searched.exact
    assert searched.cost == pytest.approx(best)
    assert sum(map(cost, searched.grouping.members)) == pytest.approx(best)


@given(st.sampled_from([(12, 3), (16, 4), (20, 10), (32, 8), (24, 2), (40, 5)]), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_search_is_never_worse_than_adjacent_heads(shape: tuple[int, int], seed: int) -> None:
    heads, groups = shape
    cost = random_cost(seed)
    searched = search_grouping(heads, groups, cost, max_evaluations=60)
    adjacent = Grouping.contiguous(heads, groups)
    assert searched.cost <= sum(map(cost, adjacent.members)) + 1e-12
    assert searched.contiguous_cost == pytest.approx(sum(map(cost, adjacent.members)))
    assert (searched.grouping.num_heads, searched.grouping.num_groups) == shape


@pytest.mark.parametrize(("heads", "groups"), [(32, 16), (32, 8), (32, 4), (40, 8), (28, 4), (36, 12)])
def test_local_search_finds_planted_groups(heads: int, groups: int) -> None:
    place = list(range(heads))
    random.Random(1).shuffle(place)
    planted = {h: place.index(h) * groups // heads for h in range(heads)}
    noise = random.Random(2)
    bumps = {pair: noise.random() for pair in itertools.combinations(range(heads), 2)}

    def cost(members: tuple[int, ...]) -> Any:
        pairs = list(itertools.combinations(sorted(members), 2))
        return sum((planted[i] != planted[j]) + bumps[i, j] for i, j in pairs) ** 0.8

    searched = search_grouping(heads, groups, cost)
    assert not searched.exact
    assert all(len({planted[h] for h in group}) == 1 for group in searched.grouping.members)


def test_search_is_repeatable_and_prices_each_set_once() -> None:
    seen = []

    def cost(members: tuple[int, ...]) -> float:
        seen.append(members)
        return random_cost(3)(members)

    one = search_grouping(24, 6, cost, max_evaluations=100)
    assert len(seen) == len(set(seen)) == one.evaluations
    assert search_grouping(24, 6, random_cost(3), max_evaluations=100) == one


def test_groups_must_divide_heads() -> None:
    with pytest.raises(UsageError, match="Choose one of 1, 2, 3, 6"):
        search_grouping(6, 4, random_cost(0))


@pytest.mark.parametrize("name", ["mean", "first", "aligned", "pca"])
@pytest.mark.parametrize("heads", [6, 12])
def test_search_finds_hidden_twins_by_each_methods_own_residual(name: str, heads: int) -> None:
    block = tied(make_block("partial", heads, 6, biases=True), 3)
    if name in ("aligned", "pca"):
        block = regauged(block, seed=1, unitary=name == "aligned")
    block = block.permuted(Grouping(((0, 2, 4), (1, 5, 3))))
    method, statistics = get_method(name), make_statistics(mean=0.2)
    moments = block_moments(block, statistics)
    searched = search_grouping(6, 3, residual_cost(method, [moments]))
    assert searched.grouping.members == ((0, 3), (1, 5), (2, 4))
    assert searched.cost == pytest.approx(0, abs=1e-9)
    merged = merge_block(method, block, searched.grouping, statistics).block
    x = make_inputs(mean=0.2)
    torch.testing.assert_close(attention(merged, x), attention(block, x), rtol=1e-6, atol=1e-7)


def priced(method: Any, moments: BlockMoments, grouping: Grouping) -> float:
    """The residual that a search minimises, from the maps themselves."""
    parts = [residual(moments, members, method.maps(moments, members, MergeOptions())) for members in grouping.members]
    return sum(keys / moments.total[0] + values / moments.total[1] for keys, values in parts)


def test_heads_that_add_little_to_the_output_may_lose_their_keys() -> None:
    """Heads 0 and 3 have large keys and next to no output: each can share with a head that needs the room."""
    block, statistics = make_block("half", 6, 6), make_statistics(0)
    quiet = torch.tensor([0, 3])
    w_k, w_o = block.w_k.clone(), block.w_o.clone()
    w_k[quiet] *= 4
    w_o[:, quiet] *= 1e-4
    moments = block_moments(replace(block, w_k=w_k, w_o=w_o), statistics)
    priced_so = moments.by_output()
    torch.testing.assert_close(priced_so.keys.power, torch.einsum("kkaa->k", moments.values.weighted))
    assert priced_so.values is moments.values
    grouping = search_grouping(6, 3, residual_cost(get_method("pca"), [moments])).grouping
    assert not any({0, 3} <= set(group) for group in grouping.members)


@pytest.mark.parametrize("heads", [6, 12])
@pytest.mark.parametrize("context", [None, 30])
def test_search_never_worsens_the_residual(heads: int, context: int | None) -> None:
    method, options = get_method("pca"), MergeOptions(max_context=context)
    for seed in range(4):
        block, statistics = make_block("half", heads, 6, seed=seed), make_statistics(seed)
        moments = block_moments(block, statistics, options)
        for groups in (1, 2, 3):
            best = search_grouping(6, groups, residual_cost(method, [moments], options))
            pair = [priced(method, moments.by_output(), g) for g in (best.grouping, Grouping.contiguous(6, groups))]
            searched, adjacent = pair
            assert searched <= adjacent * (1 + 1e-9)
            assert best.cost == pytest.approx(searched, rel=1e-6)


def test_layers_may_share_one_grouping() -> None:
    """T5's position bias belongs to the heads of all its layers, so they are searched together."""
    blocks = [make_block("none", seed=s) for s in range(3)]
    statistics = make_statistics()
    moments = [block_moments(b, statistics) for b in blocks]
    method = get_method("pca")
    cost, single = residual_cost(method, moments), [residual_cost(method, [m]) for m in moments]
    assert cost((0, 4)) == pytest.approx(sum(s((0, 4)) for s in single))
    assert search_grouping(6, 3, cost).cost <= sum(cost(g) for g in Grouping.contiguous(6, 3).members)
