"""Head layouts, groupings, and the one place that reshapes heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gqa_convert.errors import UsageError
from gqa_convert.heads import Grouping, HeadLayout, divisors, merge_heads, split_groups, split_heads


@given(st.integers(1, 500))
def test_divisors_are_all_of_them(number: int) -> None:
    assert divisors(number) == tuple(d for d in range(1, number + 1) if number % d == 0)


@pytest.mark.parametrize(("heads", "kv_heads", "kind"), [(8, 8, "MHA"), (8, 2, "GQA"), (8, 1, "MQA"), (1, 1, "MHA")])
def test_layout_names_its_kind(heads: int, kv_heads: int, kind: str) -> None:
    layout = HeadLayout(num_query_heads=heads, num_kv_heads=kv_heads, head_dim=4)
    assert (layout.kind, layout.group_size) == (kind, heads // kv_heads)
    assert layout.legal_groups == divisors(kv_heads)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 3, 4), (8, 16, 4), (8, 0, 4), (0, 1, 4), (8, 8, -1)])
def test_impossible_layouts_are_refused(heads: int, kv_heads: int, dim: int) -> None:
    with pytest.raises(UsageError):
        HeadLayout(num_query_heads=heads, num_kv_heads=kv_heads, head_dim=dim)


def test_refusal_names_the_choices() -> None:
    with pytest.raises(UsageError, match=r"32 query heads cannot be shared by 6 KV heads\. Choose one of 1, 2, 4, 8"):
        HeadLayout(num_query_heads=32, num_kv_heads=6, head_dim=64)


@given(st.integers(1, 8), st.integers(1, 8))
def test_contiguous_groups_are_those_of_repeat_kv(groups: int, size: int) -> None:
    """Query head h reads KV head h // size: `repeat_interleave` is what transformers' `repeat_kv` does."""
    grouping = Grouping.contiguous(groups * size, groups)
    read = torch.arange(groups).repeat_interleave(size).tolist()
    assert [next(g for g, members in enumerate(grouping.members) if h in members) for h in range(groups * size)] == read
    assert grouping.is_contiguous
    assert (grouping.num_groups, grouping.group_size, grouping.num_heads) == (groups, size, groups * size)


@pytest.mark.parametrize("members", [((0, 1), (2,)), ((0, 0), (1, 2)), ((1, 2), (3, 4)), ((0, 2), (1, 1))])
def test_groupings_hold_every_head_once(members: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(UsageError):
        Grouping(members)


def test_contiguous_grouping_must_divide() -> None:
    with pytest.raises(UsageError, match="1, 2, 4, 8"):
        Grouping.contiguous(8, 3)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2))
def test_splitting_and_merging_undo_each_other(heads: int, dim: int, other: int, axis: int) -> None:
    shape = [other, other, other]
    shape[axis] = heads * dim
    x = torch.randn(shape)
    split = split_heads(x, heads, axis)
    assert split.shape[axis : axis + 2] == (heads, dim)
    assert torch.equal(merge_heads(split, axis), x)


def test_axis_that_does_not_split_is_refused() -> None:
    with pytest.raises(ValueError, match="axis 0 of size 6 does not split into 4 heads"):
        split_heads(torch.zeros(6), 4)


def test_groups_are_gathered_in_their_own_order() -> None:
    x = torch.arange(8).view(4, 2).flatten()
    grouping = Grouping(((3, 0), (2, 1)))
    assert split_groups(x, grouping).tolist() == [[[6, 7], [0, 1]], [[4, 5], [2, 3]]]
    assert (grouping.order, grouping.is_contiguous) == ((3, 0, 2, 1), False)
