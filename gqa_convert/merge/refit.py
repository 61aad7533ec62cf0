"""Refit of o_proj after a merge: the ridge least squares that makes up for the changed attention patterns.

With z the concatenated outputs of the merged block's heads and y what the block should add to the residual stream, the
best W_o has the closed form (Y^T Z + lam W_prior) (Z^T Z + lam I)^-1. Only sums over tokens are needed.

Shape suffixes: N tokens, Z = H V (heads' outputs, concatenated), O output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OutputSums:
    """Sums over tokens that the refit needs, in float64; add two to join them."""

    zz: Tensor
    """(Z, Z): sum of z z^T"""
    yz: Tensor
    """(O, Z): sum of y z^T"""
    z: Tensor
    """(Z,): sum of z"""
    y: Tensor
    """(O,): sum of y"""
    yy: float
    """Sum of |y|^2"""
    count: int
    """Tokens"""

    @classmethod
    def from_samples(cls, z_NZ: Tensor, y_NO: Tensor) -> OutputSums:
        """Sums over N tokens."""
        z, y = z_NZ.double(), y_NO.double()
        return cls(zz=z.T @ z, yz=y.T @ z, z=z.sum(0), y=y.sum(0), yy=float(y.square().sum()), count=len(z))

    def __add__(self, other: OutputSums) -> OutputSums:
        return OutputSums(
            zz=self.zz + other.zz,
            yz=self.yz + other.yz,
            z=self.z + other.z,
            y=self.y + other.y,
            yy=self.yy + other.yy,
            count=self.count + other.count,
        )

    def error(self, w_o_OZ: Tensor, b_o_O: Tensor | None = None) -> float:
        """Mean over tokens of |y - W z - b|^2 as a share of the mean of |y|^2."""
        w = w_o_OZ.double()
        lost = self.yy - 2 * (w * self.yz).sum() + ((w @ self.zz) * w).sum()
        if b_o_O is not None:
            b = b_o_O.double()
            lost = lost + self.count * b.square().sum() - 2 * b @ (self.y - w @ self.z)
        return float(lost) / self.yy if self.yy else 0.0


@dataclass(frozen=True, kw_only=True)
class RefitResult:
    """A refitted o_proj."""

    w_o: Tensor
    """(O, Z), in the dtype that came in"""
    b_o: Tensor | None
    """(O,), where there was one"""
    error_before: float
    """Normalised mean square error over the tokens of the sums, with the o_proj that came in."""
    error_after: float
    """The same with the refitted one; never larger."""


def refit_output(sums: OutputSums, w_o_OZ: Tensor, b_o_O: Tensor | None = None, *, ridge: float = 1e-3) -> RefitResult:
    """Fit o_proj (and its bias, if it has one) by least squares, drawn towards the weights that come in.

    `ridge` is a share of the mean diagonal of Z^T Z (of its covariance, with a bias): with few tokens the fit must not
    follow them exactly.

    Raises:
        ValueError: if the shapes of sums and weights do not belong together.
    """
    if sums.yz.shape != w_o_OZ.shape:
        raise ValueError(f"sums of shape {tuple(sums.yz.shape)} for an o_proj of shape {tuple(w_o_OZ.shape)}")
    prior = w_o_OZ.double()
    zz, yz = sums.zz, sums.yz
    if b_o_O is not None:
        zz = zz - torch.outer(sums.z, sums.z) / sums.count
        yz = yz - torch.outer(sums.y, sums.z) / sums.count
    strength = ridge * zz.diagonal().mean()
    system = (zz + zz.T) / 2 + strength * torch.eye(len(zz), dtype=zz.dtype, device=zz.device)
    # Solved for the change, not for the weights: the change is 0 where the fit cannot be improved.
    change = torch.linalg.solve(system, (yz - prior @ zz).T).T if strength > 0 else torch.zeros_like(prior)
    w_o = prior + change
    b_o = None if b_o_O is None else (sums.y - w_o @ sums.z) / sums.count
    return RefitResult(
        w_o=w_o.to(w_o_OZ.dtype),
        b_o=None if b_o is None or b_o_O is None else b_o.to(b_o_O.dtype),
        error_before=sums.error(prior, b_o_O),
        error_after=sums.error(w_o, b_o),
    )
