"""A plain forward pass of one attention block in float64: slow, short, and what the merges are tested against.

Shape suffixes: N positions, H query heads, K KV heads, R = H / K, D head_dim, X input width, O output width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.merge.block import AttentionBlock, RotaryLayout


def rotate(x_HND: Tensor, rotary: RotaryLayout, positions_N: Tensor) -> Tensor:
    """Turn each rotary pair of `x` by its frequency times the position; the other dims pass through."""
    if not rotary.rotary_dim:
        return x_HND
    first, second = (list(dims) for dims in zip(*rotary.pairs, strict=True))
    angle_NP = positions_N[:, None] * torch.tensor(rotary.frequencies, dtype=x_HND.dtype)
    cos, sin = angle_NP.cos(), angle_NP.sin()
    turned = x_HND.clone()
    turned[..., first] = x_HND[..., first] * cos - x_HND[..., second] * sin
    turned[..., second] = x_HND[..., second] * cos + x_HND[..., first] * sin
    return turned


def attention(
    block: AttentionBlock,
    x_NX: Tensor,
    *,
    states_MY: Tensor | None = None,
    causal: bool = True,
    position_bias_HNM: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Return the block's output (N, O) for one sequence, in float64.

    Cross-attention reads `states_MY`, and then nothing is masked. `scale` multiplies the scores (1 / sqrt(D) by
    default). Under `qk_norm` heads are divided by their root mean square; weights of the norm are taken as 1.
    """
    block = block.to(torch.float64)
    x = x_NX.double()
    y = x if states_MY is None else states_MY.double()

    def project(w: Tensor, b: Tensor | None, inputs: Tensor) -> Tensor:
        out = torch.einsum("hdx,nx->hnd", w, inputs)
        return out if b is None else out + b[:, None]

    q, k, v = (project(block.w_q, block.b_q, x), project(block.w_k, block.b_k, y), project(block.w_v, block.b_v, y))
    if block.qk_norm:
        q, k = (z * z.square().mean(-1, keepdim=True).rsqrt() for z in (q, k))
    q = rotate(q, block.rotary, torch.arange(len(x)).double())
    k = rotate(k, block.rotary, torch.arange(len(y)).double())
    k, v = (z.repeat_interleave(block.queries_per_kv, dim=0) for z in (k, v))
    scores = q @ k.transpose(1, 2) * (block.head_dim**-0.5 if scale is None else scale)
    if position_bias_HNM is not None:
        scores = scores + position_bias_HNM
    if causal and states_MY is None:
        scores = scores.masked_fill(torch.ones(len(x), len(y), dtype=torch.bool).triu(1), -torch.inf)
    out = torch.einsum("hnd,ohd->no", scores.softmax(-1) @ v, block.w_o)
    return out if block.b_o is None else out + block.b_o
