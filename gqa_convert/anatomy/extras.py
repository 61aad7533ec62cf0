"""Per-head parameters beside q, k, v and o: norms over all heads or one a head, attention sinks, gates.

They belong to their heads, so they must change places with them. Which parameters of an attention module these are is
no list of names: what could lie in heads by its shape is a candidate, and the proof on a tiny model chooses
(`gqa_convert.anatomy.freedom`).

Shape suffixes: H query heads, K KV heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from gqa_convert.anatomy.block_names import HeadExtra
from gqa_convert.anatomy.shapes import ShapeDifference, index_of, index_split
from gqa_convert.heads import merge_heads, split_heads

if TYPE_CHECKING:
    from torch import Tensor

    from gqa_convert.anatomy.block_names import BlockNames


def candidates(difference: ShapeDifference, blocks: Sequence[BlockNames]) -> list[list[HeadExtra]]:
    """Return what could be a per-head parameter, for each the ways in which heads could lie in it, likeliest first."""
    ways_by_name: dict[str, dict[HeadExtra, None]] = defaultdict(dict)
    for block in blocks:
        for extra in _candidates(difference, block):
            ways_by_name[extra.name][extra] = None
    return [list(ways) for ways in ways_by_name.values()]


def _candidates(difference: ShapeDifference, block: BlockNames) -> Iterator[HeadExtra]:
    lists: dict[str, list[str]] = defaultdict(list)
    own = {f"{path}.{part}" for path in (block.q, block.k, block.v, block.o) for part in ("weight", "bias")}
    for path, shape in difference.source_shapes.items():
        if path in own or not path.startswith(f"{block.module}."):
            continue
        prefix, suffix = index_split(path)
        if prefix.startswith(f"{block.module}."):
            lists[f"{prefix}.{{}}.{suffix}".removeprefix(f"{block.module}.")].append(path)
            continue
        whose: Literal["query", "kv"] = "kv" if path in difference.rows else "query"
        count = block.kv_heads if whose == "kv" else block.query_heads
        for dim, size in enumerate(shape):
            if size % count == 0 and (path not in difference.rows or difference.rows[path].dim == dim):
                yield HeadExtra(name=path.removeprefix(f"{block.module}."), heads=whose, dim=dim)
    for name, paths in lists.items():
        whose = "kv" if paths[0] in difference.stacks else "query"
        count = block.kv_heads if whose == "kv" else block.query_heads
        if sorted(index_of(path) for path in paths) == list(range(count)):
            yield HeadExtra(name=name, heads=whose)


def moved_extras(
    get: Callable[[str], Tensor | None],
    block: BlockNames,
    extras: Sequence[HeadExtra],
    query_order: Sequence[int],
    kv_order: Sequence[int],
) -> dict[str, Tensor]:
    """Return one block's per-head parameters with their heads in a new order, by parameter name.

    Args:
        get: the source's parameters by name; None where there is none.
        block: the block.
        extras: what moves.
        query_order: source query heads in their new order, (H,).
        kv_order: source KV heads in their new order, (K,); nothing is merged here.

    Raises:
        ValueError: if an axis is not one of whole heads.
    """
    moved: dict[str, Tensor] = {}
    for extra in extras:
        order = query_order if extra.heads == "query" else kv_order
        moved |= _moved(get, extra, block, order)
    return moved


def _moved(
    get: Callable[[str], Tensor | None], extra: HeadExtra, block: BlockNames, order: Sequence[int]
) -> Mapping[str, Tensor]:
    names = extra.names(block)
    tensors = [get(name) for name in names]
    held = [tensor for tensor in tensors if tensor is not None]
    if len(held) < len(names):
        return {}  # this layer has none
    if len(names) > 1:
        return dict(zip(names, [held[head] for head in order], strict=True))
    (tensor,) = held
    index = tensor.new_tensor(list(order)).long()
    heads = split_heads(tensor, len(order), extra.dim).index_select(extra.dim, index)
    return {names[0]: merge_heads(heads, extra.dim)}
