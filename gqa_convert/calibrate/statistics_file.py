"""Moments of a source's attention inputs on disk: they depend on the source and the text alone, so every method, number
of groups and grouping can use the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gqa_convert.calibrate.store import LayerStore
from gqa_convert.merge.statistics import Statistics

if TYPE_CHECKING:
    from torch import Tensor


def statistics_store(work: Path, key: Mapping[str, Any]) -> LayerStore:
    """Return the store of the moments made from what `key` describes: source, class, text, dtype."""
    return LayerStore(work, "moments", key)


def write_statistics(store: LayerStore, index: int, found: Mapping[str, Statistics]) -> None:
    """Write the moments of one layer's blocks, by path of the attention module.

    Raises:
        OutputError: if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    counts: dict[str, list[int]] = {}
    for module, one in found.items():
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
    found = {}
    for module, counts in report["counts"].items():
        kv = None
        if len(counts) > 1:
            kv = Statistics(moment=tensors[f"{module}.kv.moment"], mean=tensors[f"{module}.kv.mean"], count=counts[1])
        found[module] = Statistics(
            moment=tensors[f"{module}.moment"], mean=tensors[f"{module}.mean"], count=counts[0], kv=kv
        )
    return found
