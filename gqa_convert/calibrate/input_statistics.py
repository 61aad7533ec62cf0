"""Moments of what attention modules read, over calibration tokens: all that the closed-form merges need of the data.

Shape suffixes: N tokens, X width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.calibrate.store import LayerStore
from gqa_convert.merge.statistics import Statistics

if TYPE_CHECKING:
    from torch import Tensor


class _Sums:
    """Running float64 sums of w x and w x x^T, and of the weights w of the tokens."""

    def __init__(self) -> None:
        self.count = 0
        self.weight = 0.0
        self.xx: Tensor | None = None
        self.x: Tensor | None = None

    def add(self, x: Tensor, weight_N: Tensor | None = None) -> None:
        x_NX = x.flatten(0, -2).double()
        self.count += len(x_NX)
        self.weight += len(x_NX) if weight_N is None else float(weight_N.sum())
        if weight_N is None:
            total = x_NX.sum(0)
        else:
            total = weight_N @ x_NX
            x_NX = x_NX * weight_N.sqrt()[:, None]
        xx = x_NX.T @ x_NX
        self.xx = xx if self.xx is None else self.xx.add_(xx)
        self.x = total if self.x is None else self.x.add_(total)

    def statistics(self, kv: Statistics | None) -> Statistics:
        if self.xx is None or self.x is None:
            raise ValueError("no inputs have been added")
        xx, x = (self.xx.cpu() / self.weight, self.x.cpu() / self.weight)
        return Statistics(moment=xx, mean=x, count=self.count, kv=kv)


class InputMoments:
    """E[x x^T] and E[x] of what one attention block's queries read, in float64, and of what its keys and values read.

    Tokens that are read by keys count by the attention that they receive, where that is known.
    """

    def __init__(self) -> None:
        self._query = _Sums()
        self._kv = _Sums()

    def add(self, query: Tensor, kv: Tensor, received: Tensor | None = None) -> None:
        """Add one call.

        Args:
            query: input of the q projection, (..., X).
            kv: of the k projection, the same object where they read the same.
            received: attention received by each token of `kv`, of its shape without X; None, or another number of
                tokens, counts all tokens alike.
        """
        self._query.add(query.detach())
        tokens = kv.shape[:-1].numel()
        weight_N = None
        if received is not None and received.numel() == tokens and bool(received.sum() > 0):
            weight_N = received.detach().double().clamp_min(0).flatten()
            weight_N = weight_N * (tokens / weight_N.sum())  # every call counts by its number of tokens
        if kv is not query or weight_N is not None:
            self._kv.add(kv.detach(), weight_N)

    def statistics(self) -> Statistics:
        """Return the moments so far.

        Raises:
            ValueError: if nothing has been added.
        """
        return self._query.statistics(self._kv.statistics(None) if self._kv.count else None)


def statistics_store(work: Path, key: Mapping[str, Any]) -> LayerStore:
    """Return the store of the moments made from what `key` describes: source, class, text, dtype."""
    return LayerStore(work, "moments", key)


def write_statistics(store: LayerStore, index: int, statistics: Mapping[str, Statistics]) -> None:
    """Write the moments of one layer's blocks, by path of the attention module.

    Raises:
        OutputError: if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    counts: dict[str, list[int]] = {}
    for module, one in statistics.items():
        counts[module] = [one.count] + ([one.kv.count] if one.kv else [])
        for prefix, part in (("", one), ("kv.", one.kv)):
            if part is not None:
                tensors[f"{module}.{prefix}moment"] = part.moment
                tensors[f"{module}.{prefix}mean"] = part.mean
    store.write(index, tensors, {"counts": counts})


def read_statistics(store: LayerStore, index: int) -> dict[str, Statistics] | None:
    """Read what `write_statistics` wrote; None if it is not there."""
    read = store.read(index)
    if read is None:
        return None
    tensors, report = read
    statistics = {}
    for module, counts in report["counts"].items():
        kv = None
        if len(counts) > 1:
            kv = Statistics(moment=tensors[f"{module}.kv.moment"], mean=tensors[f"{module}.kv.mean"], count=counts[1])
        statistics[module] = Statistics(
            moment=tensors[f"{module}.moment"], mean=tensors[f"{module}.mean"], count=counts[0], kv=kv
        )
    return statistics
