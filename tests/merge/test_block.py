from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from gqa_convert.heads import Grouping
from gqa_convert.merge.block import AttentionBlock, RotaryLayout
from gqa_convert.merge.reference import attention
from tests.merge.random_blocks import KINDS, make_block, make_inputs, regauged


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [6, 2])
@pytest.mark.parametrize("biases", [False, True])
def test_change_of_coordinates_leaves_the_function(kind: str, kv_heads: int, biases: bool) -> None:
    block, x = make_block(kind, 6, kv_heads, biases=biases), make_inputs()
    close(attention(regauged(block), x), attention(block, x))


@pytest.mark.parametrize("kind", KINDS)
def test_order_of_heads_leaves_the_function(kind: str) -> None:
    block, x = make_block(kind, 12, 6, biases=True), make_inputs()
    grouping = Grouping(((4, 0, 3), (5, 1, 2)))
    moved = block.permuted(grouping)
    close(attention(moved, x), attention(block, x))
    assert block.query_order(grouping) == (8, 9, 0, 1, 6, 7, 10, 11, 2, 3, 4, 5)
    assert torch.equal(moved.w_q, block.w_q[list(block.query_order(grouping))])
    assert block.permuted(Grouping.contiguous(6, 2)) is block


def test_position_bias_moves_with_the_query_heads() -> None:
    block, x = make_block("none"), make_inputs()
    bias = torch.randn(6, len(x), len(x), dtype=torch.float64)
    grouping = Grouping(((4, 0, 3), (5, 1, 2)))
    moved = attention(block.permuted(grouping), x, position_bias_HNM=bias[list(block.query_order(grouping))])
    close(moved, attention(block, x, position_bias_HNM=bias))


def test_constant_keys_without_rotation_change_nothing_and_constant_values_move_to_the_output() -> None:
    block: Any = make_block("none", biases=True)
    x = make_inputs()
    shifted = replace(
        block,
        b_k=block.b_k + torch.randn(6, 8, dtype=torch.float64),
        b_v=block.b_v + 1,
        b_o=block.b_o - block.w_o.sum((1, 2)),
    )
    close(attention(shifted, x), attention(block, x))


def test_signs_survive_a_norm_of_keys_and_scales_vanish_in_it() -> None:
    block, x = make_block("half", qk_norm=True), make_inputs()
    assert block.freedom == "signs"
    sign = torch.tensor([1, -1, -1, 1] * 2, dtype=torch.float64)
    close(
        attention(replace(block, w_k=3 * sign[:, None] * block.w_k, w_q=sign[:, None] * block.w_q), x),
        attention(block, x),
    )


def test_reference_agrees_with_torch() -> None:
    block, x = make_block("none", biases=True), make_inputs()
    q, k, v = (
        torch.einsum("hdx,nx->hnd", w, x) + b[:, None]
        for w, b in ((block.w_q, block.b_q), (block.w_k, block.b_k), (block.w_v, block.b_v))
    )
    heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    close(attention(block, x), torch.einsum("hnd,ohd->no", heads, block.w_o) + block.b_o)
    states = make_inputs(5, 1)
    assert attention(block, x, states_MY=states).shape == (len(x), 18)


@pytest.mark.parametrize("kind", ["half", "interleaved"])
def test_rotation_agrees_with_transformers(kind: str) -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as interleaved
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half

    from gqa_convert.merge.reference import rotate

    rotary = make_block(kind).rotary
    x, positions = torch.randn(1, 2, 5, 8, dtype=torch.float64), torch.arange(5).double()
    angle = positions[:, None] * torch.tensor(rotary.frequencies, dtype=torch.float64)
    if kind == "half":
        both = torch.cat([angle, angle], -1)[None]
        want = half(x, x, both.cos(), both.sin())[0]
    else:
        want = interleaved(x.transpose(1, 2), angle.sin()[None], angle.cos()[None]).transpose(1, 2)
    close(rotate(x[0], rotary, positions), want[0])


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    block = make_block()
    with pytest.raises(ValueError, match="w_o has shape"):
        replace(block, w_o=block.w_o[:, :3])
    with pytest.raises(ValueError, match="cannot be shared"):
        replace(block, w_k=block.w_k[:4], w_v=block.w_v[:4])
    with pytest.raises(ValueError, match="rotary layout"):
        RotaryLayout(kind="half", rotary_dim=4, inv_freq=(1.0,))
    with pytest.raises(ValueError, match="exceeds"):
        replace(block, rotary=RotaryLayout(kind="half", rotary_dim=16, inv_freq=(1.0,) * 8))


def test_dtype_is_kept_and_changed_as_asked() -> None:
    block = make_block(biases=True)
    assert {getattr(block.to(torch.float32), n).dtype for n in ("w_q", "w_k", "w_v", "w_o", "b_o")} == {torch.float32}
    assert isinstance(block.to(torch.float32), AttentionBlock)
