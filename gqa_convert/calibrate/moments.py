"""Moments of what attention modules read, over calibration tokens: all that the closed-form merges need of the data.

Shape suffixes: N tokens, X width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gqa_convert.merge.statistics import Statistics

if TYPE_CHECKING:
    from torch import Tensor


class _Sums:
    """Running float64 sums of x and x x^T."""

    def __init__(self) -> None:
        self.count = 0
        self.xx: Tensor | None = None
        self.x: Tensor | None = None

    def add(self, x: Tensor) -> None:
        x_NX = x.flatten(0, -2).double()
        xx, total = x_NX.T @ x_NX, x_NX.sum(0)
        self.xx = xx if self.xx is None else self.xx.add_(xx)
        self.x = total if self.x is None else self.x.add_(total)
        self.count += len(x_NX)

    def statistics(self, kv: Statistics | None) -> Statistics:
        if self.xx is None or self.x is None:
            raise ValueError("no inputs have been added")
        xx, x = (self.xx.cpu() / self.count, self.x.cpu() / self.count)
        return Statistics(moment=xx, mean=x, count=self.count, kv=kv)


class InputMoments:
    """E[x x^T] and E[x] of one attention block's input, in float64, and of what k and v read where that is another."""

    def __init__(self) -> None:
        self._query = _Sums()
        self._kv = _Sums()

    def add(self, query: Tensor, kv: Tensor) -> None:
        """Add one call: the inputs of the q and of the k projection, the same object where they read the same."""
        self._query.add(query.detach())
        if kv is not query:
            self._kv.add(kv.detach())

    def statistics(self) -> Statistics:
        """Return the moments so far.

        Raises:
            ValueError: if nothing has been added.
        """
        return self._query.statistics(self._kv.statistics(None) if self._kv.count else None)
