"""What the merges know of a layer's input: its mean and its second moment.

Keys, values and queries are linear in the input, so this is all that the closed forms need. Shape suffix: X width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

ENOUGH = 4
"""Tokens per dimension of the input from which moments stand for themselves."""
NOISE = 0.01
"""Variance that is added to moments of hardly any tokens, as a share of the input's; less with more tokens."""


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Moments of an attention block's input x over calibration tokens (after the norm that precedes the block).

    A bias needs no augmented input: E[(Wx + b)(Wx + b)^T] is W Cov W^T plus the outer product of the means.

    Raises:
        ValueError: if the shapes do not belong together.
    """

    moment: Tensor
    """(X, X): E[x x^T]"""
    mean: Tensor
    """(X,): E[x]"""
    count: int
    """Tokens seen; 0 where no data was."""
    kv: Statistics | None = None
    """Moments of what k and v read, where that is another input (cross-attention: the encoder's states)."""

    def __post_init__(self) -> None:
        width = self.mean.shape[0]
        if tuple(self.moment.shape) != (width, width):
            raise ValueError(f"moment has shape {tuple(self.moment.shape)}, mean {tuple(self.mean.shape)}")

    @classmethod
    def identity(cls, width: int) -> Statistics:
        """Moments of white noise: what is assumed where there is no data."""
        return cls(moment=torch.eye(width, dtype=torch.float64), mean=torch.zeros(width, dtype=torch.float64), count=0)

    @classmethod
    def from_norm(cls, weight_X: Tensor) -> Statistics:
        """Moments of white noise scaled by the weight of the norm before the block: the better guess without data."""
        scale = weight_X.double()
        return cls(moment=torch.diag(scale.square()), mean=torch.zeros_like(scale), count=0)

    @classmethod
    def from_sums(cls, sum_xx: Tensor, sum_x: Tensor, count: int) -> Statistics:
        """Moments from sums over `count` tokens of x x^T (X, X) and of x (X,)."""
        return cls(moment=sum_xx.double() / count, mean=sum_x.double() / count, count=count)

    @classmethod
    def from_samples(cls, x_NX: Tensor) -> Statistics:
        """Moments of N tokens given at once."""
        x = x_NX.double()
        return cls.from_sums(x.T @ x, x.sum(0), len(x))

    @property
    def steadied(self) -> Statistics:
        """The same with a little white noise, where fewer than four tokens for each dimension of the input were seen.

        A direction that no token took would count for nothing, and heads that are alike would not be told from others.
        """
        width = self.mean.shape[0]
        lacking = max(0.0, 1 - self.count / (ENOUGH * width)) if self.count else 0.0
        kv = None if self.kv is None else self.kv.steadied
        if not lacking:
            return replace(self, kv=kv)
        power = float(self.covariance.diagonal().mean())
        noise = NOISE * lacking * power * torch.eye(width, dtype=torch.float64, device=self.moment.device)
        return replace(self, moment=self.moment.double() + noise, kv=kv)

    @property
    def covariance(self) -> Tensor:
        """(X, X), float64: E[x x^T] - E[x] E[x]^T, symmetric."""
        mean = self.mean.double()
        moment = self.moment.double()
        return (moment + moment.T) / 2 - torch.outer(mean, mean)
