"""What a merge loses by its own measure: closed forms against brute force, and pca against everything else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gqa_convert.heads import Grouping
from gqa_convert.merge import get_method
from gqa_convert.merge.apply import group_maps, merge_block
from gqa_convert.merge.block import AttentionBlock
from gqa_convert.merge.maps import GroupMaps, HeadMaps, residual
from gqa_convert.merge.methods.pca import cost as pca_cost
from gqa_convert.merge.moments import block_moments
from gqa_convert.merge.options import MergeOptions
from gqa_convert.merge.statistics import Statistics
from tests.merge.random_blocks import (
    KINDS,
    make_block,
    make_inputs,
    make_statistics,
    random_key_gauge,
    random_matrices,
)

MEMBERS = (4, 0, 3)
GROUPING = Grouping((MEMBERS, (5, 1, 2)))


def brute_force(
    block: AttentionBlock, merged: AttentionBlock, x: torch.Tensor, members: Grouping = GROUPING
) -> tuple[float, float]:
    """(key, value) error of a merged block over samples of the input, positions independent."""
    before, after = block.permuted(members), merged
    r, size = block.queries_per_kv, members.group_size
    key_error = value_error = 0.0
    q0, q1 = (torch.einsum("hdx,nx->hnd", b.w_q, x) + (0 if b.b_q is None else b.b_q[:, None]) for b in (before, after))
    k0, k1 = (torch.einsum("hdx,nx->hnd", b.w_k, x) + (0 if b.b_k is None else b.b_k[:, None]) for b in (before, after))
    v0, v1 = (torch.einsum("hdx,nx->hnd", b.w_v, x) + (0 if b.b_v is None else b.b_v[:, None]) for b in (before, after))
    if block.b_o is not None:
        v0, v1 = v0 - v0.mean(1, keepdim=True), v1 - v1.mean(1, keepdim=True)
    static = list(range(block.rotary.rotary_dim, block.head_dim))
    k0[..., static] -= k0[..., static].mean(1, keepdim=True)
    k1[..., static] -= k1[..., static].mean(1, keepdim=True)
    for h in range(block.num_query_heads):
        old, new = h // r, h // r // size
        for i, j in block.rotary.pairs:
            outer = sum(
                sign * torch.einsum("n,m->nm", torch.complex(q[h, :, i], -q[h, :, j]), torch.complex(k[:, i], k[:, j]))
                for sign, q, k in ((1, q0, k0[old]), (-1, q1, k1[new]))
            )
            key_error += float(outer.abs().square().mean()) / 2
        outer = q0[h][:, static] @ k0[old][:, static].T - q1[h][:, static] @ k1[new][:, static].T
        key_error += float(outer.square().mean())
        lost = v0[old] @ before.w_o[:, h].T - v1[new] @ after.w_o[:, h].T
        value_error += float(lost.square().sum(1).mean())
    return key_error, value_error


@pytest.mark.parametrize("name", ["pca", "aligned"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [6, 12])
@pytest.mark.parametrize("biases", [False, True])
def test_residual_is_the_error_over_samples(name: str, kind: str, heads: int, biases: bool) -> None:
    block, x = make_block(kind, heads, 6, biases=biases), make_inputs(300, mean=0.3)
    statistics = Statistics.from_samples(x)
    moments = block_moments(block, statistics)
    merged = merge_block(get_method(name), block, GROUPING, statistics, moments=moments)
    keys, values = brute_force(block, merged.block, x)
    assert merged.report.key_residual * moments.total[0] == pytest.approx(keys, rel=1e-8)
    assert merged.report.value_residual * moments.total[1] == pytest.approx(values, rel=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [6, 12])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("fields", [{}, {"shift_invariant": False}, {"qk_norm": True}, {"value_gauge": "none"}])
def test_pca_residual_is_the_sum_of_discarded_eigenvalues(
    kind: str, heads: int, biases: bool, fields: dict[str, Any]
) -> None:
    block = make_block(kind, heads, 6, biases=biases, **fields)
    moments = block_moments(block, make_statistics(mean=0.3))
    maps = group_maps(get_method("pca"), moments, MEMBERS, MergeOptions())
    torch.testing.assert_close(
        torch.tensor(pca_cost(moments, MEMBERS)), torch.tensor(residual(moments, MEMBERS, maps)), rtol=1e-7, atol=1e-12
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [6, 12])
@pytest.mark.parametrize("statistics", [None, make_statistics(mean=0.3)])
def test_pca_loses_least(kind: str, heads: int, statistics: Statistics | None) -> None:
    block = make_block(kind, heads, 6, biases=True)
    moments = block_moments(block, statistics)
    best = residual(moments, MEMBERS, group_maps(get_method("pca"), moments, MEMBERS, MergeOptions()))
    others = [
        group_maps(get_method(n), moments, MEMBERS, MergeOptions(renorm=True)) for n in ("mean", "first", "aligned")
    ]
    generator = torch.Generator().manual_seed(0)
    others += [random_maps(block, generator) for _ in range(20)]
    others += [nearby(others[2], block, generator) for _ in range(20)]
    for maps in others:
        keys, values = residual(moments, MEMBERS, maps)
        assert best[0] <= keys * (1 + 1e-9)
        assert best[1] <= values * (1 + 1e-9)


def random_maps(block: AttentionBlock, generator: torch.Generator) -> GroupMaps:
    size = len(MEMBERS)
    few = replace(block, w_k=block.w_k[:size], w_v=block.w_v[:size], b_k=None, b_v=None)
    few = replace(few, w_q=few.w_q[:size], w_o=few.w_o[:, :size], b_q=None)
    keys = [random_key_gauge(few, generator) for _ in range(2)]
    values = [random_matrices(size, block.w_v.shape[1], generator) for _ in range(2)]
    return GroupMaps(
        keys=HeadMaps(encode=keys[0] / size, decode=keys[1]), values=HeadMaps(encode=values[0] / size, decode=values[1])
    )


def nearby(maps: GroupMaps, block: AttentionBlock, generator: torch.Generator) -> GroupMaps:
    noise = random_maps(block, generator)

    def mix(a: HeadMaps, b: HeadMaps) -> HeadMaps:
        return HeadMaps(encode=a.encode + b.encode / 50, decode=a.decode + b.decode / 50)

    return GroupMaps(keys=mix(maps.keys, noise.keys), values=mix(maps.values, noise.values))


def test_total_is_the_cost_of_dropping_all_heads() -> None:
    block, x = make_block("half", 12, 6, biases=True), make_inputs(300)
    moments = block_moments(block, Statistics.from_samples(x))
    none = replace(
        block.permuted(GROUPING),
        w_k=block.w_k[:2] * 0,
        w_v=block.w_v[:2] * 0,
        b_k=block.b_k[:2] * 0,
        b_v=block.b_v[:2] * 0,
    )
    assert moments.total == pytest.approx(brute_force(block, none, x), rel=1e-8)


def test_statistics_are_the_same_however_they_are_made() -> None:
    x = make_inputs(100, mean=1.0)
    one = Statistics.from_samples(x)
    other = Statistics.from_sums(x.T @ x, x.sum(0), 100)
    torch.testing.assert_close(one.covariance, torch.cov(x.T, correction=0))
    torch.testing.assert_close(one.moment, other.moment)
    block = make_block("partial", biases=True)
    white = [block_moments(block, s).values.gram for s in (None, Statistics.identity(20))]
    torch.testing.assert_close(*white)
    assert torch.equal(
        Statistics.from_norm(torch.tensor([1.0, 2.0])).moment.diagonal(), torch.tensor([1.0, 4.0]).double()
    )


def test_heads_without_weight_are_no_trouble() -> None:
    """A dead query head, a dead value head and a dead o_proj block: nothing to weigh by, nothing to invert."""
    block = make_block("half", biases=True)
    for name in ("w_q", "b_q", "w_v", "b_v", "w_k", "b_k"):
        tensor = getattr(block, name).clone()
        tensor[0] = 0
        block = replace(block, **{name: tensor})
    w_o = block.w_o.clone()
    w_o[:, 1] = 0
    block = replace(block, w_o=w_o)
    for name in ("pca", "aligned"):
        merged = merge_block(get_method(name), block, Grouping.contiguous(6, 3), make_statistics()).block
        assert all(
            getattr(merged, n).isfinite().all() for n in ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o")
        )
