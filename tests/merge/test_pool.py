"""Contract of the tensor-level methods, over the whole registry."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gqa_convert.errors import UsageError
from gqa_convert.heads import Grouping, split_groups
from gqa_convert.merge import all_methods, generator_for, get_method

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
POOLS = sorted(name for name, method in all_methods().items() if not method.touches_query_output)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def pool_of(name: str) -> Callable[..., torch.Tensor]:
    pool = get_method(name).pool
    assert pool is not None
    return pool


def run(name: str, x: torch.Tensor, grouping: Grouping, dim: int = 0, key: str = "k") -> torch.Tensor:
    return pool_of(name)(x, grouping, dim, generator=generator_for(0, key))


@pytest.mark.parametrize("name", ["mean", "first"])
@given(
    groups=st.integers(1, 4),
    size=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    dim=st.integers(-2, 1),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_tied_heads_are_merged_bit_for_bit(
    name: str, groups: int, size: int, dtype: torch.dtype, dim: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(groups * size, generator=generator).tolist()
    grouping = Grouping(tuple(tuple(order[g * size : (g + 1) * size]) for g in range(groups)))
    tied = torch.randn(groups, 4, 5, generator=generator).to(dtype)
    tied[0, 0, 0] = -0.0
    heads = torch.empty(groups * size, 4, 5, dtype=dtype)
    for g, members in enumerate(grouping.members):
        heads[list(members)] = tied[g]
    x, want = heads.flatten(0, 1), tied.flatten(0, 1)
    if dim % 2:
        x, want = x.T, want.T
    got = run(name, x, grouping, dim)
    assert got.dtype == dtype
    assert torch.equal(bits(got), bits(want))


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_shape_dtype_finite_deterministic(name: str, dtype: torch.dtype, dim: int) -> None:
    x = torch.randn(24, 24, 3).transpose(0, 1).to(dtype)
    if dim == -1:
        x = x.movedim(1, -1)
    for groups in (1, 2, 3, 6):
        grouping = Grouping.contiguous(6, groups)
        got = run(name, x, grouping, dim)
        want = list(x.shape)
        want[dim] = groups * 4
        assert list(got.shape) == want
        assert got.dtype == dtype
        assert got.isfinite().all()
        assert torch.equal(got, run(name, x, grouping, dim))
        if groups == 6:
            assert torch.equal(bits(got), bits(x))


def test_mean_is_the_mean_of_the_members() -> None:
    x = torch.randn(6 * 4, 7, dtype=torch.float64)
    grouping = Grouping(((5, 0, 3), (1, 4, 2)))
    want = split_groups(x, grouping).mean(1).flatten(0, 1)
    torch.testing.assert_close(run("mean", x, grouping), want)
    torch.testing.assert_close(run("mean", x.bfloat16(), grouping), want.bfloat16(), rtol=2e-2, atol=2e-2)


def test_random_has_the_tensors_spread_and_is_seeded_by_key() -> None:
    x = torch.randn(8 * 16, 256) * 0.03
    grouping = Grouping.contiguous(8, 2)
    a, b = run("random", x, grouping, key="a"), run("random", x, grouping, key="b")
    assert a.std().item() == pytest.approx(0.03, rel=0.05)
    assert not torch.equal(a, b)
    assert torch.equal(a, pool_of("random")(x, grouping, 0, generator=generator_for(0, "a")))
    assert not torch.equal(a, pool_of("random")(x, grouping, 0, generator=generator_for(1, "a")))
    fixed = pool_of("random")(x, grouping, 0, generator=generator_for(0, "a"), std=1.0)
    assert fixed.std().item() == pytest.approx(1.0, rel=0.05)


def test_random_pools_vectors_by_their_mean() -> None:
    norm = torch.rand(8 * 16) + 1
    grouping = Grouping.contiguous(8, 2)
    assert torch.equal(run("random", norm, grouping), run("mean", norm, grouping))


def test_axis_that_does_not_split_is_refused() -> None:
    with pytest.raises(ValueError, match="10"):
        run("mean", torch.zeros(10, 3), Grouping.contiguous(4, 2))


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Did you mean mean\? Choose one of .*first, mean"):
        get_method("meen")
    with pytest.raises(UsageError, match="Choose one of"):
        get_method("zzz")


def test_listing_the_methods_imports_no_torch() -> None:
    code = (
        "import sys; from gqa_convert.merge import all_methods; "
        "assert {'mean', 'first', 'random'} <= set(all_methods()); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
