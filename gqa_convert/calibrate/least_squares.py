"""The o projection that best gives wanted outputs from the heads' outputs: ridge regression towards the present one.

Shape suffixes: N tokens, Z width of the heads' outputs side by side, O output width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class NormalEquations:
    """Sums over tokens of what the regression of y (N, O) on z (N, Z) needs, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self._zz: Tensor | None = None
        self._yz: Tensor | None = None
        self._z: Tensor | None = None
        self._y: Tensor | None = None
        self._yy = 0.0

    def add(self, z: Tensor, y: Tensor) -> None:
        """Add tokens; leading axes are flattened."""
        z_NZ = z.flatten(0, -2).double()
        y_NO = y.flatten(0, -2).to(z.device).double()
        parts = (z_NZ.T @ z_NZ, y_NO.T @ z_NZ, z_NZ.sum(0), y_NO.sum(0))
        old = (self._zz, self._yz, self._z, self._y)
        self._zz, self._yz, self._z, self._y = (a if b is None else b + a for a, b in zip(parts, old, strict=True))
        self._yy += float(y_NO.square().sum())
        self.count += len(z_NZ)

    def solve(self, weight_OZ: Tensor, bias_O: Tensor | None, *, damping: float) -> tuple[Tensor, Tensor | None]:
        """Return the (weight, bias) that minimise the squared error plus a pull towards `weight_OZ`.

        The pull is `damping` times the mean diagonal of z's second moment. A bias is fitted where there is one, free.

        Raises:
            ValueError: if nothing has been added.
        """
        import torch

        zz, yz, z, y = self._sums()
        if bias_O is not None:
            zz = zz - torch.outer(z, z) / self.count
            yz = yz - torch.outer(y, z) / self.count
        width = zz.shape[0]
        pull = max(damping * float(zz.diagonal().mean()), 1e-300)
        prior = weight_OZ.to(zz)
        system = zz + pull * torch.eye(width, dtype=zz.dtype, device=zz.device)
        weight = torch.linalg.solve(system, (yz + pull * prior).T).T
        bias = None if bias_O is None else ((y - weight @ z) / self.count).to(bias_O)
        return weight.to(weight_OZ), bias

    def error(self, weight_OZ: Tensor, bias_O: Tensor | None = None) -> float:
        """Mean square error of `weight z + bias`, as a share of y's mean square."""
        zz, yz, z, y = self._sums()
        w = weight_OZ.to(zz)
        total = self._yy - 2 * float((w * yz).sum()) + float(((w @ zz) * w).sum())
        if bias_O is not None:
            b = bias_O.to(zz)
            total += self.count * float(b @ b) + 2 * float(b @ (w @ z - y))
        return max(0.0, total) / (self._yy or 1.0)

    def _sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if self._zz is None or self._yz is None or self._z is None or self._y is None:
            raise ValueError("no tokens have been added")
        return self._zz, self._yz, self._z, self._y
