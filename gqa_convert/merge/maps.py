"""What a method decides about one group: linear maps from its heads to the shared head, and back.

shared = sum over heads of encode_h x_h, and head h then reads decode_h shared in the place of x_h. Keys are folded into
q (q_h becomes decode_h^T q_h), values into o_proj (W_o,h becomes W_o,h decode_h), so the shared head is all that is
stored. Maps of turning pairs are multiplication by one complex number, the only maps that commute with every rotation.

Shape suffixes: R heads in the gRoup, D head_dim, S static dims, P turning pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.merge.moments import BlockMoments, KeyMoments, RealMoments


@dataclass(frozen=True, kw_only=True)
class HeadMaps:
    """Maps of one group's keys or values."""

    encode: Tensor
    """(R, D, D)"""
    decode: Tensor
    """(R, D, D)"""


@dataclass(frozen=True, kw_only=True)
class GroupMaps:
    """Maps of one group."""

    keys: HeadMaps
    values: HeadMaps
    rescale: bool = False
    """Let the shared head be scaled to the size of its members, and q and o_proj against it."""


def mean_maps(size: int, dim: int, *, like: Tensor) -> HeadMaps:
    """Plain mean: encode I / R, decode I."""
    eye = torch.eye(dim, dtype=like.dtype, device=like.device).expand(size, dim, dim)
    return HeadMaps(encode=eye / size, decode=eye)


def key_maps(
    keys: KeyMoments, encode_PR: Tensor, decode_PR: Tensor, encode_RSS: Tensor, decode_RSS: Tensor
) -> HeadMaps:
    """Assemble (R, D, D) maps from complex numbers for the turning pairs and matrices for the static dims."""
    dim = 2 * len(keys.pairs) + len(keys.static_dims)

    def build(scalars_PR: Tensor, matrices_RSS: Tensor) -> Tensor:
        out = matrices_RSS.new_zeros(matrices_RSS.shape[0], dim, dim)
        for (i, j), z in zip(keys.pairs, scalars_PR, strict=True):
            out[:, i, i] = out[:, j, j] = z.real
            out[:, i, j], out[:, j, i] = -z.imag, z.imag
        if keys.static_dims:
            rows = torch.tensor(keys.static_dims)
            out[:, rows[:, None], rows] = matrices_RSS
        return out

    return HeadMaps(encode=build(encode_PR, encode_RSS), decode=build(decode_PR, decode_RSS))


def residual(moments: BlockMoments, members: tuple[int, ...], maps: GroupMaps) -> tuple[float, float]:
    """Return (key, value) residual of sharing `members` under `maps`.

    Keys: variance of the error of the scores (before scaling), summed over the group's query heads. Values: mean square
    error of the heads' contributions to the block's output, summed likewise. Both for independent positions.
    """
    keys, heads = moments.keys, list(members)
    first, second = ([pair[i] for pair in keys.pairs] for i in (0, 1))
    encode_PR, decode_PR = (
        torch.complex(m[:, first, first], m[:, second, first]).T for m in (maps.keys.encode, maps.keys.decode)
    )
    error_PRR = torch.eye(len(heads), device=encode_PR.device) - decode_PR[:, :, None] * encode_PR[:, None]
    seen_PRR = error_PRR @ keys.gram[:, heads][:, :, heads] @ error_PRR.mH
    turning = float(torch.einsum("prr,pr->", seen_PRR.real, keys.weight[:, heads]))
    dims = list(keys.static_dims)
    static = HeadMaps(encode=maps.keys.encode[:, dims][:, :, dims], decode=maps.keys.decode[:, dims][:, :, dims])
    return turning + real_residual(keys.static, members, static), real_residual(moments.values, members, maps.values)


def real_residual(moments: RealMoments, members: tuple[int, ...], maps: HeadMaps) -> float:
    """Sum over the members of E |root_h (x_h - decode_h sum_g encode_g x_g)|^2."""
    heads = list(members)
    r, s = len(heads), moments.mean.shape[1]
    gram = moments.stacked(members, weighted=False)
    decode = torch.einsum("hab,hbc->hac", moments.root[heads], maps.decode).reshape(r * s, s)
    encode = maps.encode.transpose(0, 1).flatten(1, 2)
    error = torch.block_diag(*moments.root[heads]) - decode @ encode
    return float(torch.einsum("ab,bc,ac->", error, gram, error))
