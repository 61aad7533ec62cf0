"""Principal components of a group of heads, from their moments.

Shape suffixes: R heads in the gRoup, S dims of a head, P turning pairs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gqa_convert.merge.maps import HeadMaps

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.merge.moments import KeyMoments, RealMoments


def complex_component(keys: KeyMoments, members: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the (encode, decode) numbers (P, R) of the main component of each turning pair (own derivation).

    With u the main eigenvector of the Gram matrix weighed by the queries' power w, the shared key is
    sum_h conj(u_h) sqrt(w_h) k_h and head h reads u_h / sqrt(w_h) of it.
    """
    heads = list(members)
    root_PR = keys.root[:, heads]
    vector_PR = torch.linalg.eigh(keys.weighted[:, heads][:, :, heads]).eigenvectors[..., -1]
    inverse_PR = torch.where(root_PR > 0, root_PR, torch.ones_like(root_PR)).reciprocal() * (root_PR > 0)
    return vector_PR.conj() * root_PR, vector_PR * inverse_PR


def complex_cost(keys: KeyMoments, members: tuple[int, ...]) -> float:
    """Sum over the turning pairs of the discarded eigenvalues: variance of the scores' error."""
    if not keys.pairs:
        return 0.0
    heads = list(members)
    eigenvalues = torch.linalg.eigvalsh(keys.weighted[:, heads][:, :, heads])
    return float(eigenvalues[:, :-1].clamp_min(0).sum())


def real_components(moments: RealMoments, members: tuple[int, ...], *, ordered: bool = False) -> HeadMaps:
    """Return the maps of the S main components of the members' stacked, weighted vectors.

    The components may be mixed by any invertible matrix. By default they are turned to look as much as they can like
    the sum of the members, which spreads the power over the dims as it was. `ordered` leaves the largest first and
    splits each one's size evenly between shared head and decoder: what the fold of slow pairs needs, as its error is
    least when the two dims of a pair are balanced and the largest components turn slowest.
    """
    heads, s = list(members), moments.mean.shape[1]
    values, vectors = torch.linalg.eigh(moments.stacked(members))
    vectors_RSS = vectors[:, -s:].flip(1).unflatten(0, (len(heads), s))
    encode = vectors_RSS.transpose(1, 2) @ moments.root[heads]
    decode = moments.inverse[heads] @ vectors_RSS
    if ordered:
        power = values[-s:].flip(0)
        size = power.clamp_min(1e-12 * float(power.max())).pow(0.25) if s and power.max() > 0 else power + 1
        return HeadMaps(encode=encode / size[:, None], decode=decode * size)
    target = moments.stacked(members, weighted=False).unflatten(1, (len(heads), s)).sum(1)
    likeness = encode.transpose(0, 1).flatten(1, 2) @ target
    left, _, right = torch.linalg.svd(likeness)
    turn = right.T @ left.T
    return HeadMaps(encode=turn @ encode, decode=decode @ turn.T)


def real_cost(moments: RealMoments, members: tuple[int, ...]) -> float:
    """Sum of the discarded eigenvalues of the members' stacked, weighted vectors."""
    s = moments.mean.shape[1]
    return float(torch.linalg.eigvalsh(moments.stacked(members))[:-s].clamp_min(0).sum()) if s else 0.0
