"""Random attention blocks of every kind, and random changes of them that leave their function as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gqa_convert.merge.block import AttentionBlock, RotaryLayout
from gqa_convert.merge.statistics import Statistics

KINDS = ("none", "half", "interleaved", "partial")
WIDTH = 20


def layout(kind: str, head_dim: int = 8) -> RotaryLayout:
    if kind == "none":
        return RotaryLayout()
    rotary_dim = head_dim // 2 if kind == "partial" else head_dim
    return RotaryLayout(
        kind="interleaved" if kind == "interleaved" else "half",
        rotary_dim=rotary_dim,
        inv_freq=torch.tensor([0.9 * 0.2**i for i in range(rotary_dim // 2)]),
    )


def make_block(
    kind: str = "half", heads: int = 6, kv_heads: int = 6, *, biases: bool = False, seed: int = 0, **fields: Any
) -> AttentionBlock:
    """A block of head_dim 8 (values 6 wide), input 20 wide, output 18, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) / 3

    return AttentionBlock(
        w_q=draw(heads, 8, WIDTH),
        w_k=draw(kv_heads, 8, WIDTH),
        w_v=draw(kv_heads, 6, WIDTH),
        w_o=draw(18, heads, 6),
        b_q=draw(heads, 8) if biases else None,
        b_k=draw(kv_heads, 8) if biases else None,
        b_v=draw(kv_heads, 6) if biases else None,
        b_o=draw(18) if biases else None,
        rotary=layout(kind),
        **fields,
    )


def make_inputs(count: int = 24, seed: int = 0, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=generator, dtype=torch.float64) / 3
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) @ mix + mean


def make_statistics(seed: int = 0, mean: float = 0.0) -> Statistics:
    return Statistics.from_samples(make_inputs(500, seed, mean))


def tied(block: AttentionBlock, groups: int) -> AttentionBlock:
    """The block with the heads of each of `groups` adjacent groups made equal in k and v."""

    def tie(x: torch.Tensor | None) -> Any:
        if x is None:
            return None
        size = len(x) // groups
        return x[::size].repeat_interleave(size, dim=0)

    return replace(block, w_k=tie(block.w_k), w_v=tie(block.w_v), b_k=tie(block.b_k), b_v=tie(block.b_v))


def random_key_gauge(block: AttentionBlock, generator: torch.Generator, *, unitary: bool = False) -> torch.Tensor:
    """(K, D, D): for each head a random map that commutes with its rotations; the dims that pass through mix freely."""
    k, d = block.num_kv_heads, block.head_dim
    gauge = torch.zeros(k, d, d, dtype=torch.float64)
    for i, j in block.rotary.pairs:
        angle = torch.rand(k, generator=generator, dtype=torch.float64) * 6.3
        size = 1.0 if unitary else torch.rand(k, generator=generator, dtype=torch.float64) + 0.5
        gauge[:, i, i] = gauge[:, j, j] = size * angle.cos()
        gauge[:, j, i], gauge[:, i, j] = size * angle.sin(), -size * angle.sin()
    rest = slice(block.rotary.rotary_dim, d)
    gauge[:, rest, rest] = random_matrices(k, d - block.rotary.rotary_dim, generator, orthogonal=unitary)
    return gauge


def random_matrices(count: int, size: int, generator: torch.Generator, *, orthogonal: bool = False) -> torch.Tensor:
    """(count, size, size) random orthogonal matrices, or well-conditioned invertible ones."""
    turn: torch.Tensor = torch.linalg.qr(torch.randn(count, size, size, generator=generator, dtype=torch.float64)).Q
    if orthogonal:
        return turn
    return turn * (torch.rand(count, 1, size, generator=generator, dtype=torch.float64) + 0.5)


def regauged(block: AttentionBlock, seed: int = 0, *, unitary: bool = False) -> AttentionBlock:
    """The same function in other coordinates: each head's k and v changed at random, q and o changed against it."""
    generator = torch.Generator().manual_seed(seed)
    keys = random_key_gauge(block, generator, unitary=unitary)
    values = random_matrices(block.num_kv_heads, block.w_v.shape[1], generator, orthogonal=unitary)
    r = block.queries_per_kv
    queries = torch.linalg.inv(keys).transpose(1, 2).repeat_interleave(r, dim=0)
    outputs = torch.linalg.inv(values).repeat_interleave(r, dim=0)

    def times(matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        return None if bias is None else torch.einsum("hab,hb->ha", matrix, bias)

    return replace(
        block,
        w_k=keys @ block.w_k,
        b_k=times(keys, block.b_k),
        w_v=values @ block.w_v,
        b_v=times(values, block.b_v),
        w_q=queries @ block.w_q,
        b_q=times(queries, block.b_q),
        w_o=torch.einsum("ohd,hde->ohe", block.w_o, outputs),
    )
