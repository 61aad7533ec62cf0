"""Contract of the block-level merges, over the whole registry."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gqa_convert.heads import Grouping
from gqa_convert.merge import all_methods, get_method
from gqa_convert.merge.apply import merge_block
from gqa_convert.merge.block import AttentionBlock
from gqa_convert.merge.options import MergeOptions
from gqa_convert.merge.reference import attention
from gqa_convert.merge.statistics import Statistics
from tests.merge.random_blocks import KINDS, make_block, make_inputs, make_statistics, regauged, tied

METHODS = sorted(all_methods())
SOLVED = sorted(name for name, method in all_methods().items() if method.touches_query_output)
SHUFFLED = Grouping(((4, 0, 3), (5, 1, 2)))
TENSORS = ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o")


def merge(
    name: str, block: AttentionBlock, grouping: Grouping, statistics: Statistics | None = None, **options: Any
) -> AttentionBlock:
    return merge_block(get_method(name), block, grouping, statistics, MergeOptions(**options)).block


def tensors(block: AttentionBlock) -> dict[str, torch.Tensor]:
    return {name: getattr(block, name) for name in TENSORS if getattr(block, name) is not None}


def error(block: AttentionBlock, merged: AttentionBlock, x: torch.Tensor, **how: Any) -> float:
    want = attention(block, x, **how)
    return float((attention(merged, x, **how) - want).norm() / want.norm())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("grouping", [Grouping.contiguous(6, 6), Grouping(((4,), (0,), (3,), (5,), (1,), (2,)))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_head_a_group_is_the_identity(name: str, grouping: Grouping, dtype: torch.dtype) -> None:
    block = make_block("partial", 12, 6, biases=True).to(dtype)
    got = tensors(merge(name, block, grouping, make_statistics(), max_context=100))
    for key, want in tensors(block.permuted(grouping)).items():
        assert torch.equal(got[key], want), key


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [6, 12])
@pytest.mark.parametrize("biases", [False, True])
def test_shapes_dtype_finite_deterministic(name: str, kind: str, heads: int, biases: bool) -> None:
    block = make_block(kind, heads, 6, biases=biases).to(torch.float32)
    statistics = make_statistics(mean=0.2)
    got = merge(name, block, SHUFFLED, statistics, max_context=50)
    again = merge(name, block, SHUFFLED, statistics, max_context=50)
    assert got.num_kv_heads == 2
    for key, value in tensors(got).items():
        assert value.dtype == torch.float32
        assert value.isfinite().all()
        assert torch.equal(value, getattr(again, key))
        if key not in ("w_k", "w_v", "b_k", "b_v"):
            assert value.shape == getattr(block, key).shape
    assert set(tensors(got)) == set(tensors(block))


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"random"}))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [6, 12])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("statistics", [None, make_statistics(mean=0.3)])
def test_tied_heads_merge_exactly(
    name: str, kind: str, heads: int, biases: bool, statistics: Statistics | None
) -> None:
    grouping = Grouping.contiguous(6, 2)
    block = tied(make_block(kind, heads, 6, biases=biases), 2)
    assert error(block, merge(name, block, grouping, statistics), make_inputs(mean=0.3)) < 1e-7


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [6, 12])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("fold", [None])
def test_tied_heads_in_other_coordinates_merge_exactly(
    name: str, kind: str, heads: int, biases: bool, fold: Any
) -> None:
    block = tied(make_block(kind, heads, 6, biases=biases), 2)
    hidden = regauged(block, seed=5, unitary=name == "aligned").permuted(Grouping(((3, 1, 5), (0, 4, 2))))
    grouping = Grouping(((1, 3, 5), (0, 2, 4)))
    for statistics in (None, make_statistics(mean=0.3)):
        merged = merge(name, hidden, grouping, statistics, max_context=fold)
        assert error(hidden, merged, make_inputs(mean=0.3)) < 1e-6


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", [6, 12])
def test_coordinates_of_the_heads_do_not_matter(name: str, kind: str, heads: int) -> None:
    """The merge of a block and of the same function in other coordinates are the same function."""
    block, x, statistics = make_block(kind, heads, 6), make_inputs(), make_statistics()
    hidden = regauged(block, seed=3, unitary=name == "aligned")
    one, other = merge(name, block, SHUFFLED, statistics), merge(name, hidden, SHUFFLED, statistics)
    assert error(one, other, x) < 1e-6


@pytest.mark.parametrize("name", SOLVED)
def test_solved_merges_beat_the_mean_on_heads_in_random_coordinates(name: str) -> None:
    noisy = tied(make_block("half"), 2)
    noise = make_block("half", seed=9)
    noisy = replace(noisy, w_k=noisy.w_k + noise.w_k / 10, w_v=noisy.w_v + noise.w_v / 10)
    block, x, statistics = regauged(noisy, seed=1, unitary=True), make_inputs(), make_statistics()
    grouping = Grouping.contiguous(6, 2)
    solved, mean = (error(block, merge(n, block, grouping, statistics), x) for n in (name, "mean"))
    assert solved < 0.35 * mean


@pytest.mark.parametrize("name", SOLVED)
def test_fields_that_forbid_changes_are_respected(name: str) -> None:
    block, statistics = make_block("half", biases=True), make_statistics(mean=0.2)
    fixed = merge(name, replace(block, key_gauge="none", value_gauge="none"), SHUFFLED, statistics)
    mean = merge("mean", block, SHUFFLED)
    for key in TENSORS:
        torch.testing.assert_close(getattr(fixed, key), getattr(mean, key), rtol=1e-12, atol=1e-12)
    signed = merge(name, replace(block, qk_norm=True), SHUFFLED, statistics)
    ratio = signed.w_q / block.permuted(SHUFFLED).w_q
    torch.testing.assert_close(ratio.abs(), torch.ones_like(ratio))
    hidden = regauged(tied(block, 2), seed=2)
    only_values = replace(tied(block, 2), qk_norm=True, w_v=hidden.w_v, b_v=hidden.b_v, w_o=hidden.w_o)
    signs = torch.tensor([1.0, -1, 1, -1, -1, 1], dtype=torch.float64)[:, None]
    flipped = replace(
        only_values,
        **{n: (getattr(only_values, n).mT * signs.unsqueeze(-1)).mT for n in ("w_q", "w_k")},
        b_q=only_values.b_q * signs,
        b_k=only_values.b_k * signs,
    )
    expected = 1e-6 if name == "pca" else 2.0
    got = merge(name, flipped, Grouping.contiguous(6, 2), statistics)
    assert error(flipped, got, make_inputs(mean=0.2)) < expected


def test_attention_sinks_keep_the_constant_part_of_keys() -> None:
    block = make_block("none", biases=True)
    statistics = make_statistics(mean=0.5)
    free = merge("pca", block, SHUFFLED, statistics)
    bound = merge("pca", replace(block, shift_invariant=False), SHUFFLED, statistics)
    assert not torch.allclose(free.w_k, bound.w_k)


def test_cross_attention_reads_the_encoders_statistics() -> None:
    block = tied(make_block("none"), 2)
    hidden = regauged(block)
    states = make_statistics(4)
    both = replace(make_statistics(1), kv=states)
    merged = merge("pca", hidden, Grouping.contiguous(6, 2), both)
    assert error(hidden, merged, make_inputs(), states_MY=make_inputs(9, 4)) < 1e-6
    lost = make_block("none")
    one = merge("pca", lost, SHUFFLED, both)
    other = merge("pca", lost, SHUFFLED, make_statistics(1))
    assert not torch.allclose(one.w_v, other.w_v)


def test_output_bias_keeps_the_mean_of_the_values() -> None:
    """With a bias on o_proj the constant part of the output survives any merge of the values."""
    block: Any = make_block("none", biases=True)
    block = replace(block, w_q=block.w_q * 0, b_q=block.b_q * 0)  # uniform attention: the output is linear in v
    x = make_inputs(4000, mean=2.0)
    statistics = make_statistics(mean=2.0).from_samples(x)
    for name in SOLVED:
        merged = merge(name, block, SHUFFLED, statistics)
        want = attention(block, x[:50], states_MY=x).mean(0)
        torch.testing.assert_close(attention(merged, x[:50], states_MY=x).mean(0), want, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_pca_keeps_the_size_of_weights(kind: str) -> None:
    block = make_block(kind, 12, 6)
    merged = merge("pca", block, SHUFFLED, make_statistics())
    for name in ("w_k", "w_v"):
        want = getattr(block, name)[list(SHUFFLED.order)].unflatten(0, (2, 3)).square().sum((2, 3)).mean(1)
        torch.testing.assert_close(getattr(merged, name).square().sum((1, 2)), want)


def test_mismatches_are_refused() -> None:
    block = make_block()
    with pytest.raises(ValueError, match="grouping of 4 heads"):
        merge("pca", block, Grouping.contiguous(4, 2))
    narrow = make_statistics()
    narrow = replace(narrow, moment=narrow.moment[:5, :5], mean=narrow.mean[:5])
    with pytest.raises(ValueError, match="statistics of width 5"):
        merge("pca", block, SHUFFLED, narrow)
    with pytest.raises(ValueError, match="moment has shape"):
        replace(narrow, mean=narrow.mean[:4])


def test_report_says_what_was_lost_and_where_heads_went() -> None:
    block = make_block("half", 12, 6)
    report = merge_block(get_method("pca"), block, SHUFFLED, make_statistics(), MergeOptions(max_context=10)).report
    assert 0 < report.key_residual < 1
    assert 0 < report.value_residual < 1
    assert report.query_order == block.query_order(SHUFFLED)
    assert report.folded_pairs == 2
    assert (
        merge_block(get_method("aligned"), block, SHUFFLED, None, MergeOptions(max_context=10)).report.folded_pairs == 0
    )


def test_renorm_gives_the_mean_the_size_of_its_members() -> None:
    block = make_block("half")
    statistics = make_statistics()
    plain, renormed = (merge("aligned", block, SHUFFLED, statistics, renorm=r) for r in (False, True))
    members = block.w_v[list(SHUFFLED.members[0])]
    power = torch.einsum("hdx,xy,hdy->h", members, statistics.covariance, members).mean()
    seen = torch.einsum("dx,xy,dy->", renormed.w_v[0], statistics.covariance, renormed.w_v[0])
    assert plain.w_v[0].norm() < renormed.w_v[0].norm()
    assert float(seen) == pytest.approx(float(power), rel=0.05)
