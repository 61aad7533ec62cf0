"""Generalised Procrustes: turn the heads of a group onto their common mean (Jin et al. 2024, arXiv 2412.20677).

Shape suffixes: R heads in the gRoup, S dims of a head, P turning pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gqa_convert.merge.maps import HeadMaps

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.merge.moments import KeyMoments, RealMoments

_SWEEPS = 100
_TOLERANCE = 1e-12


def align_pairs(keys: KeyMoments, members: tuple[int, ...], *, renorm: bool = False) -> tuple[Tensor, Tensor]:
    """Return the (encode, decode) numbers (P, R): unit phases, and their mean over the members.

    Starts from the phases of the main eigenvector and improves one head at a time.
    """
    heads = list(members)
    r = len(heads)
    gram = keys.gram[:, heads][:, :, heads]
    phase = _unit(torch.linalg.eigh(gram).eigenvectors[..., -1].conj())
    for _ in range(_SWEEPS):
        before = phase.clone()
        for h in range(r):
            others = (phase * gram[:, :, h]).sum(-1) - phase[:, h] * gram[:, h, h]
            phase[:, h] = torch.where(others.abs() > 0, _unit(others), phase[:, h])
        if not phase.numel() or (phase - before).abs().max() < _TOLERANCE:
            break
    phase = phase * phase[:, :1].conj()
    encode = phase / r
    if renorm:
        power = torch.einsum("pa,pab,pb->p", encode, gram, encode.conj()).real
        encode = encode * _ratio(torch.einsum("paa->p", gram).real / r, power)[:, None]
    return encode, phase.conj()


def align_vectors(moments: RealMoments, members: tuple[int, ...], *, renorm: bool = False) -> HeadMaps:
    """Return the maps of orthogonal alignment: encode Q_h / R, decode Q_h^T."""
    r, s = len(members), moments.mean.shape[1]
    stacked = moments.stacked(members, weighted=False)
    gram = stacked.unflatten(1, (r, s)).unflatten(0, (r, s))
    vectors = torch.linalg.eigh(stacked).eigenvectors[:, r * s - s :]
    turn = _polar(vectors.unflatten(0, (r, s)).transpose(1, 2))
    for _ in range(_SWEEPS):
        before = turn.clone()
        for h in range(r):
            others = torch.einsum("gab,gbc->ac", turn, gram[:, :, h]) - turn[h] @ gram[h, :, h]
            turn[h] = _polar(others)
        if not turn.numel() or (turn - before).abs().max() < _TOLERANCE:
            break
    # Only relative turns matter: the first member keeps its own coordinates.
    turn = turn[0].T @ turn
    encode = turn / r
    if renorm:
        power = torch.einsum("hab,hbgc,gac->", encode, gram, encode)
        encode = encode * _ratio(torch.einsum("haha->", gram) / r, power)
    return HeadMaps(encode=encode, decode=turn.transpose(1, 2))


def _unit(z: Tensor) -> Tensor:
    size = z.abs()
    return torch.where(size > 0, z / size.clamp_min(torch.finfo(size.dtype).tiny), torch.ones_like(z))


def _polar(matrix: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(matrix)
    turn: Tensor = left @ right
    return turn


def _ratio(wanted: Tensor, seen: Tensor) -> Tensor:
    return torch.where(seen > 0, wanted / torch.where(seen > 0, seen, torch.ones_like(seen)), 1.0).sqrt()
