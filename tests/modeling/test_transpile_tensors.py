"""The tensor mathematics of transpiling, each against a plain statement of what it must mean."""

from __future__ import annotations

from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gqa_convert.modeling.transpile.configs import rotary_share
from gqa_convert.modeling.transpile.tensors import (
    fold_scale,
    fold_shift,
    from_blocks,
    halves_first,
    joined_per_head,
    per_head,
)

sizes = st.integers(1, 5)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(width=sizes, rows=st.integers(1, 3000), seed=st.integers(0, 9))
def test_a_folded_norm_computes_what_norm_and_layer_did(width: int, rows: int, seed: int) -> None:
    x, weight, bias = random(3, width, seed=seed), random(rows, width, seed=seed + 1), random(rows, seed=seed + 2)
    scale, shift = random(width, seed=seed + 3), random(width, seed=seed + 4)
    expected = nn.functional.linear((x * scale + shift).double(), weight.double(), bias.double())
    folded = nn.functional.linear(x.double(), fold_scale(weight, scale).double(), fold_shift(weight, shift, bias))
    torch.testing.assert_close(folded, expected, rtol=1e-5, atol=1e-5)


@given(dtype=st.sampled_from([torch.bfloat16, torch.float16]), seed=st.integers(0, 99))
def test_the_product_of_half_precision_numbers_is_exact(dtype: torch.dtype, seed: int) -> None:
    weight, scale = random(4, 8, seed=seed).to(dtype), random(8, seed=seed + 1).to(dtype)
    assert torch.equal(fold_scale(weight, scale).double(), weight.double() * scale.double())


@given(heads=sizes, dim=sizes, width=sizes)
def test_rows_per_head_come_apart_and_together(heads: int, dim: int, width: int) -> None:
    q, k, v = (random(heads * dim, width, seed=s) for s in range(3))
    fused = joined_per_head(q, k, v, heads)
    assert all(torch.equal(per_head(fused, heads, which), x) for which, x in enumerate((q, k, v)))
    row = fused.view(heads, 3, dim, width)
    assert torch.equal(row[heads - 1, 2, dim - 1], v[-1])


def turn_pairs(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn neighbours (2i, 2i+1) by an angle each, as complex numbers."""
    turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten(-2)


def turn_halves(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Turn (i, i + R/2) by the same angles."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


@given(heads=sizes, pairs=sizes, rest=st.integers(0, 3), seed=st.integers(0, 9))
def test_scores_are_the_same_in_either_rotary_convention(heads: int, pairs: int, rest: int, seed: int) -> None:
    rotary = 2 * pairs
    q, k = (random(heads * (rotary + rest), seed=seed + s).double() for s in range(2))
    angles = [random(pairs, seed=seed + s).double() for s in (2, 3)]

    def scores(a: torch.Tensor, b: torch.Tensor, turn: Callable[..., torch.Tensor]) -> torch.Tensor:
        both = (x.view(heads, -1) for x in (a, b))
        sides = [torch.cat([turn(x[:, :rotary], t), x[:, rotary:]], 1) for x, t in zip(both, angles, strict=True)]
        return (sides[0] * sides[1]).sum(1)

    moved = scores(halves_first(q, heads, rotary), halves_first(k, heads, rotary), turn_halves)
    torch.testing.assert_close(moved, scores(q, k, turn_pairs))


@given(blocks=sizes, rows=sizes)
def test_blocks_are_taken_apart_in_order(blocks: int, rows: int) -> None:
    x = torch.arange(blocks * 3 * rows)
    want = [b * 3 * rows + rows + r for b in range(blocks) for r in range(rows)]
    assert from_blocks(x, blocks, 1).tolist() == want


@given(head_dim=st.integers(1, 512), share=st.floats(0, 1))
def test_the_rotary_share_gives_the_rotary_size_back(head_dim: int, share: float) -> None:
    size = int(head_dim * share)
    assert int(head_dim * rotary_share(size, head_dim)) == size
    assert 0 <= rotary_share(size, head_dim) <= 1
