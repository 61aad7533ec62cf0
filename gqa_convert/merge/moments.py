"""Second moments of the heads of one block: all that the closed forms, their residuals and the search look at.

Shape suffixes: K KV heads, R query heads of one KV head, D head_dim (of v too), S dims treated as not turning,
P turning rotary pairs, X input width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from gqa_convert.merge.options import MergeOptions

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.merge.block import AttentionBlock
    from gqa_convert.merge.statistics import Statistics


@dataclass(frozen=True, kw_only=True)
class RealMoments:
    """Vectors x_h of the K heads and the quadratic form in which an error of head h counts.

    The error of approximating x_h by y_h costs E |root_h (x_h - y_h)|^2.
    """

    gram: Tensor
    """(K, K, S, S): E[x_h x_g^T] at [h, g]"""
    mean: Tensor
    """(K, S): E[x_h]"""
    root: Tensor
    """(K, S, S): symmetric square root of the form"""
    inverse: Tensor
    """(K, S, S): pseudo-inverse of the root"""

    @cached_property
    def weighted(self) -> Tensor:
        """(K, K, S, S): the Gram matrix of root_h x_h."""
        return self.root[:, None] @ self.gram @ self.root

    def to(self, dtype: torch.dtype) -> RealMoments:
        """The same in another real dtype."""
        parts = (self.gram, self.mean, self.root, self.inverse)
        gram, mean, root, inverse = (part.to(dtype) for part in parts)
        return RealMoments(gram=gram, mean=mean, root=root, inverse=inverse)

    def scaled(self, factor_K: Tensor) -> RealMoments:
        """The same vectors, the error of head h counting `factor_K[h]` times as much."""
        root = factor_K.sqrt()[:, None, None]
        inverse = torch.where(root > 0, root, torch.ones_like(root)).reciprocal() * (root > 0)
        return replace(self, root=self.root * root, inverse=self.inverse * inverse)

    def stacked(self, members: tuple[int, ...], *, weighted: bool = True) -> Tensor:
        """(R S, R S): the Gram matrix of the members' vectors laid end to end."""
        heads = torch.tensor(members, device=self.gram.device)
        blocks = (self.weighted if weighted else self.gram)[heads[:, None], heads]
        return blocks.transpose(1, 2).flatten(2, 3).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class KeyMoments:
    """Keys: complex numbers for the pairs that turn, real vectors for the dims that do not (or hardly)."""

    pairs: tuple[tuple[int, int], ...]
    """The two dims of each turning pair."""
    gram: Tensor
    """(P, K, K) complex: E[k_h conj(k_g)]"""
    weight: Tensor
    """(P, K): E|q|^2 summed over the query heads, halved because a score is the real part of conj(q) k"""
    static_dims: tuple[int, ...]
    """The other dims, slowest first."""
    folded: int
    """How many of the static dims belong to slowly turning pairs."""
    static: RealMoments
    """Moments of the static dims, weighed by the queries."""

    @property
    def power(self) -> Tensor:
        """(K,): cost of dropping each head's keys."""
        pairs = torch.einsum("pkk->k", self.weighted.real)
        return pairs + torch.einsum("kkaa->k", self.static.weighted)

    def scaled(self, factor_K: Tensor) -> KeyMoments:
        """The same keys, the error of head h counting `factor_K[h]` times as much."""
        return replace(self, weight=self.weight * factor_K, static=self.static.scaled(factor_K))

    @cached_property
    def root(self) -> Tensor:
        """(P, K): square root of the weight."""
        return self.weight.clamp_min(0).sqrt()

    @cached_property
    def weighted(self) -> Tensor:
        """(P, K, K) complex: the Gram matrix of root_h k_h."""
        return self.gram * (self.root[:, :, None] * self.root[:, None])


@dataclass(frozen=True, kw_only=True)
class BlockMoments:
    """Moments of one block under given statistics and options."""

    keys: KeyMoments
    values: RealMoments
    block: AttentionBlock
    values_centred: bool
    """The constant part of the values travels in the bias of o_proj, so the moments leave it out."""

    def to(self, dtype: torch.dtype) -> BlockMoments:
        """The same moments in another real dtype, for a search that prices many groups; the block stays as it is."""
        keys = replace(
            self.keys,
            gram=self.keys.gram.to(dtype.to_complex()),
            weight=self.keys.weight.to(dtype),
            static=self.keys.static.to(dtype),
        )
        return replace(self, keys=keys, values=self.values.to(dtype))

    @property
    def total(self) -> tuple[float, float]:
        """(key, value) cost of dropping every head's keys or values: what residuals are measured against."""
        return float(self.keys.power.sum()), float(torch.einsum("kkaa->", self.values.weighted))

    def by_output(self) -> BlockMoments:
        """The moments by which groups are priced: a head's key error counts by what the head adds to the output.

        The scores of a head are worth what they choose among: an error of so much of their variance costs so much of
        the mean square of the head's contribution. (Own derivation; `docs/merging.md` has what it brings.)
        """
        power, output = self.keys.power, torch.einsum("kkaa->k", self.values.weighted)
        return replace(self, keys=self.keys.scaled(output / torch.where(power > 0, power, torch.ones_like(power))))


def psd_root(form_KSS: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of positive semidefinite matrices (K, S, S), and its pseudo-inverse."""
    # F = V diag(l) V^T; F^(1/2) = V diag(sqrt l) V^T; eigenvalues that are rounding count as zero.
    values, vectors = torch.linalg.eigh(form_KSS)
    floor = values.amax(-1, keepdim=True).clamp_min(0) * 1e-13 if values.shape[-1] else values
    kept = values > floor
    root = values.clamp_min(0).sqrt() * kept
    inverse = torch.where(kept, root, torch.ones_like(root)).reciprocal() * kept

    root_KSS, inverse_KSS = ((vectors * diagonal[:, None]) @ vectors.mT for diagonal in (root, inverse))
    return root_KSS, inverse_KSS


def block_moments(
    block: AttentionBlock, statistics: Statistics | None = None, options: MergeOptions | None = None
) -> BlockMoments:
    """Compute the moments of a block's keys and values, in float64.

    Without statistics the input is taken as white noise. Cost at width X: three products of (K D, X) by (X, X) and one
    (K D, X) by (X, K D).

    Raises:
        ValueError: if the statistics are of another width than the block.
    """
    options = options or MergeOptions()
    block = block.to(torch.float64)
    queries = statistics
    inputs = None if statistics is None else (statistics.kv or statistics)
    return BlockMoments(
        keys=_keys(block, queries, inputs, options),
        values=_values(block, inputs, options),
        block=block,
        values_centred=_centred(block),
    )


def _project(w_KDX: Tensor, bias_KD: Tensor | None, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
    """Return W Cov (K, D, X) and the mean of W x + b (K, D)."""
    bias = w_KDX.new_zeros(w_KDX.shape[:2]) if bias_KD is None else bias_KD
    if statistics is None:
        return w_KDX, bias
    if statistics.mean.shape[0] != w_KDX.shape[2]:
        raise ValueError(f"statistics of width {statistics.mean.shape[0]} for a block of width {w_KDX.shape[2]}")
    covariance = statistics.covariance.to(w_KDX.device)
    return w_KDX @ covariance, w_KDX @ statistics.mean.double().to(w_KDX.device) + bias


def _centred(block: AttentionBlock) -> bool:
    """Rows of attention sum to 1, so a constant part of the values can pass through the bias of o_proj instead."""
    return block.b_o is not None and block.value_gauge == "full"


def _values(block: AttentionBlock, inputs: Statistics | None, options: MergeOptions) -> RealMoments:
    k = block.num_kv_heads
    # Cov[v_h, v_g] = W_h C W_g^T, with C = Cov[x]
    projected, mean = _project(block.w_v, block.b_v, inputs)
    gram = _blocks(projected, block.w_v)
    if not _centred(block):
        # E[v_h v_g^T] = Cov[v_h, v_g] + E[v_h] E[v_g]^T
        gram = gram + torch.einsum("ka,lb->klab", mean, mean)
    # An error e of head k adds W_O e to the output of each of its query heads: it costs e^T (sum_r W_O^T W_O) e.
    form = torch.einsum("okra,okrb->kab", *[block.w_o.unflatten(1, (k, -1))] * 2)
    return _real(gram, mean, form if options.weighted else None)


def _keys(
    block: AttentionBlock, queries: Statistics | None, inputs: Statistics | None, options: MergeOptions
) -> KeyMoments:
    pairs, static_dims, folded = split_dims(block, options)
    first, second = ([pair[i] for pair in pairs] for i in (0, 1))
    k = block.num_kv_heads
    projected, mean = _project(block.w_k, block.b_k, inputs)
    # Turning pairs as complex numbers, k = k_1 + i k_2: rotation by position is a factor of modulus 1, so that
    # E[k_h conj(k_g)] is the same at every position: W_h C W_g^H + mean_h conj(mean_g).
    half_PKX = torch.complex(projected[:, first], projected[:, second]).transpose(0, 1)
    keys_PKX = torch.complex(block.w_k[:, first], block.w_k[:, second]).transpose(0, 1)
    mean_PK = torch.complex(mean[:, first], mean[:, second]).T
    gram_PKK = half_PKX @ keys_PKX.mH + mean_PK[:, :, None] * mean_PK[:, None].conj()

    # A score's error is Re(conj(q) e) per pair, averaged over relative rotations: half of E|q|^2 |e|^2, with
    # E|q|^2 = diag(W_q C W_q^T + mean mean^T), summed over the query heads of a KV head.
    projected_q, mean_q = _project(block.w_q, block.b_q, queries)
    power_HD = (projected_q * block.w_q).sum(-1) + mean_q.square()
    power_KD = power_HD.unflatten(0, (k, -1)).sum(1)
    weight_PK = (power_KD[:, first] + power_KD[:, second]).T / 2

    # Dims that do not turn: covariance of keys, in the form sum_r E[q q^T] of the queries that read them.
    dims = list(static_dims)
    gram = _blocks(projected[:, dims], block.w_k[:, dims])
    if not block.shift_invariant:  # else the softmax takes a constant part of the keys away
        gram = gram + torch.einsum("ka,lb->klab", mean[:, dims], mean[:, dims])
    form_HSS = projected_q[:, dims] @ block.w_q[:, dims].transpose(1, 2)
    form_HSS = form_HSS + mean_q[:, dims, None] * mean_q[:, None, dims]
    form = form_HSS.unflatten(0, (k, -1)).sum(1)
    return KeyMoments(
        pairs=pairs,
        gram=(gram_PKK + gram_PKK.mH) / 2,
        weight=weight_PK if options.weighted else torch.full_like(weight_PK, 0.5),
        static_dims=static_dims,
        folded=folded,
        static=_real(gram, mean[:, dims], form if options.weighted else None),
    )


def split_dims(
    block: AttentionBlock, options: MergeOptions
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...], int]:
    """Return (turning pairs, dims that do not turn or hardly, how many of the latter belong to folded pairs).

    Static dims are ordered from the slowest. Nothing is folded where k cannot be undone on q.
    """
    limit = options.fold_angle / options.max_context if options.max_context else -math.inf
    if block.freedom != "full":
        limit = -math.inf
    speed = dict(zip(block.rotary.pairs, block.rotary.frequencies, strict=True))
    slow = sorted((pair for pair in speed if abs(speed[pair]) < limit), key=lambda pair: abs(speed[pair]))
    turning = tuple(pair for pair in speed if pair not in slow)
    passing = range(block.rotary.rotary_dim, block.head_dim)
    return turning, (*passing, *(dim for pair in slow for dim in pair)), 2 * len(slow)


def _blocks(projected_KSX: Tensor, weight_KSX: Tensor) -> Tensor:
    """(K, K, S, S): the covariance of every two heads."""
    k, s, _ = weight_KSX.shape
    flat = projected_KSX.flatten(0, 1) @ weight_KSX.flatten(0, 1).T
    return flat.reshape(k, s, k, s).transpose(1, 2).contiguous()


def _real(gram: Tensor, mean: Tensor, form: Tensor | None) -> RealMoments:
    k, s = mean.shape
    if form is None:
        root = inverse = torch.eye(s, dtype=gram.dtype, device=gram.device).expand(k, s, s)
    else:
        root, inverse = psd_root((form + form.transpose(1, 2)) / 2)
    return RealMoments(gram=(gram + gram.permute(1, 0, 3, 2)) / 2, mean=mean, root=root, inverse=inverse)
