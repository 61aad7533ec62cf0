"""Which layers of a deep model a shallow one keeps: at least one of every kind.

Families describe their layers by lists as long as the model is deep (`layer_types`, `no_rope_layers`, ...) and by lists
of layer numbers (`attn_layer_indices`, `cross_attention_layers`, ...). Cutting both by the same choice of layers keeps
the description consistent, whatever the lists mean.
"""

from __future__ import annotations

import re
from typing import Any

MAX_KINDS = 4  # a list with more different values than this numbers its layers rather than naming their kinds
INDEX_LIST = re.compile(r"\w*(layers|indices|indexes|idxs|layer_ids)")


def per_layer_lists(fields: dict[str, Any], depth: int) -> dict[str, list[Any]]:
    """Return the lists of `fields` that hold one entry a layer."""
    return {name: value for name, value in fields.items() if isinstance(value, list) and len(value) == depth > 1}


def index_lists(fields: dict[str, Any], depth: int) -> dict[str, list[int]]:
    """Return the lists of `fields` that hold layer numbers, ascending."""
    lists: dict[str, list[int]] = {}
    for name, value in fields.items():
        if not (isinstance(value, list) and value and INDEX_LIST.fullmatch(name)):
            continue
        if all(type(i) is int and 0 <= i < depth for i in value) and value == sorted(set(value)):
            lists[name] = value
    return lists


def choose_layers(fields: dict[str, Any], depth: int, at_least: int) -> list[int]:
    """Return the layers to keep: the first of every kind, then the earliest others up to `at_least`."""
    columns = [
        [repr(entry) for entry in column]
        for column in per_layer_lists(fields, depth).values()
        if len({repr(entry) for entry in column}) <= MAX_KINDS
    ]
    columns += [[str(i in numbers) for i in range(depth)] for numbers in index_lists(fields, depth).values()]
    seen: set[tuple[str, ...]] = set()
    chosen: list[int] = []
    for layer in range(depth):
        kind = tuple(column[layer] for column in columns)
        if kind not in seen:
            seen.add(kind)
            chosen.append(layer)
    rest = [layer for layer in range(depth) if layer not in chosen]
    return sorted(chosen + rest[: max(0, at_least - len(chosen))])


def cut_layers(fields: dict[str, Any], depth: int, chosen: list[int]) -> dict[str, Any]:
    """Return the per-layer and layer-number lists of `fields`, cut to the `chosen` layers."""
    numbers = index_lists(fields, depth)
    cut: dict[str, Any] = {name: [chosen.index(i) for i in value if i in chosen] for name, value in numbers.items()}
    for name, column in per_layer_lists(fields, depth).items():
        if name not in numbers:
            cut[name] = [column[i] for i in chosen if i < depth]
    if isinstance(fields.get("per_layer_config"), dict):
        own = {int(i): entry for i, entry in fields["per_layer_config"].items()}
        cut["per_layer_config"] = {new: own[old] for new, old in enumerate(chosen) if old in own}
    return cut
