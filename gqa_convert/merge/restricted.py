"""Merges of keys and values where the layer leaves little or no freedom.

Where a norm stands between the projection of k and the rotation, what is done to k's size cannot be undone on q; signs
of rotary pairs (and of single dims that do not turn) still can. Where even that is doubtful, only the mean is left.

Shape suffixes: R heads in the gRoup, P turning pairs, S static dims.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gqa_convert.merge.maps import HeadMaps, key_maps, mean_maps

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.merge.moments import BlockMoments


def restricted_key_maps(moments: BlockMoments, members: tuple[int, ...]) -> HeadMaps:
    """Mean of the members' keys after the signs that the block's freedom allows."""
    keys, r = moments.keys, len(members)
    if moments.block.freedom == "none":
        return mean_maps(r, moments.block.head_dim, like=keys.static.gram)
    heads = list(members)
    sign_PR = _signs(keys.gram[:, heads][:, :, heads].real)
    static_SRR = torch.einsum("hgss->shg", keys.static.gram[heads][:, heads])
    diagonal_RSS = torch.diag_embed(_signs(static_SRR).T)
    decode_PR = torch.complex(sign_PR, torch.zeros_like(sign_PR))
    return key_maps(keys, decode_PR / r, decode_PR, diagonal_RSS / r, diagonal_RSS)


def _signs(gram_BRR: Tensor) -> Tensor:
    """Signs (B, R) that make the members agree best: those of the main eigenvector, then single flips that help."""
    sign = torch.where(torch.linalg.eigh(gram_BRR).eigenvectors[..., -1] < 0, -1.0, 1.0).to(gram_BRR.dtype)
    for _ in range(gram_BRR.shape[-1]):
        for h in range(gram_BRR.shape[-1]):
            others = (gram_BRR[:, h] * sign).sum(-1) - gram_BRR[:, h, h] * sign[:, h]
            sign[:, h] = torch.where(others < 0, -1.0, 1.0)
    # Both signs of the whole are as good: keep the first member's, so that a mean of equals is a plain mean.
    return sign * sign[:, :1]
