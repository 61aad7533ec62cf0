"""Heads along an axis: merging touches keys and values only, and expanding undoes it for tied heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gqa_convert.anatomy.head_axis import Rows
from gqa_convert.heads import Grouping
from gqa_convert.merge.methods.mean import pool as mean


def mean_pool(x: torch.Tensor, grouping: Grouping, dim: int) -> torch.Tensor:
    return mean(x, grouping, dim)


@st.composite
def rows(draw: Any) -> Rows:
    groups, size, dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layout = draw(st.sampled_from([("heads", "heads"), ("concat", "concat"), ("per_head", "concat")]))
    queries = 0 if layout[0] == "heads" else groups * size
    return Rows(
        dim=draw(st.integers(0, 1)),
        heads=groups * size,
        groups=groups,
        head_dim=dim,
        layout=layout[0],
        target_layout=layout[1],
        query_heads=queries,
    )


def tensor(one: Rows, size: int) -> torch.Tensor:
    shape = [5, 5]
    shape[one.dim] = size
    return torch.randn(shape)


@given(rows())
def test_merging_undoes_expanding(one: Rows) -> None:
    merged = tensor(one, one.target_size)
    expanded = one.expand(merged)
    assert expanded.shape[one.dim] == one.size
    assert torch.equal(one.merge(expanded, mean_pool), merged)
    assert one.target_shape(tuple(expanded.shape)) == tuple(merged.shape)


@given(rows())
def test_sizes_add_up(one: Rows) -> None:
    queries = one.query_heads * one.head_dim
    assert (one.size, one.target_size) == (queries + one.kv_size, queries + one.kv_target_size)
    assert one.kv_size * one.groups == one.kv_target_size * one.heads


@pytest.mark.parametrize("layout", ["concat", "per_head"])
def test_query_rows_of_a_fused_axis_pass_through(layout: Any) -> None:
    one = Rows(dim=0, heads=4, groups=2, head_dim=3, layout=layout, target_layout="concat", query_heads=4)
    x = torch.randn(one.size, 5)
    queries = x[:12] if layout == "concat" else x.view(4, 3, 3, 5)[:, 0].reshape(12, 5)
    assert torch.equal(one.merge(x, mean_pool)[:12], queries)


def test_a_merge_takes_any_grouping() -> None:
    one = Rows(dim=0, heads=4, groups=2, head_dim=1)
    merged = one.merge(torch.tensor([0.0, 1.0, 2.0, 3.0]), mean_pool, Grouping(((0, 3), (1, 2))))
    assert merged.tolist() == [1.5, 1.5]
